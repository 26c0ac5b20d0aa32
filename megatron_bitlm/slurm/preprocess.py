"""Preprocessing as an array job through datatrove's Slurm executor, and the merge that waits for it."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bitlm.data.card import dataset_path
from megatron_bitlm.data.corpus import Corpus, open_corpus
from megatron_bitlm.errors import BitLMError


@dataclass(frozen=True)
class PreprocessArray:
    """A corpus, how to encode it, and what the tasks ask Slurm for.

    Attributes:
        output: prefix of the dataset; shards go to OUTPUT.shards/, logs and scripts to OUTPUT.slurm/.
        inputs: files and folders that every node can read.
        tasks: shards; no more than there are files do any work.
        encoding: options of the writer, as of `bitlm preprocess`.
        reading: options of the reader.
        workers: tasks that run at once; -1 for as many as Slurm lets.
        time, partition, memory_gb, job_name: of a task.
    """

    output: str
    inputs: list[str]
    tasks: int
    encoding: dict[str, Any]
    reading: dict[str, Any]
    workers: int
    time: str
    partition: str
    memory_gb: int
    job_name: str

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> PreprocessArray:
        """From the command line.

        Raises:
            BitLMError: an option out of range, an output that exists, or nothing to read.
        """
        for name, least in {"tasks": 1, "memory_gb": 1, "block_size": 1}.items():
            if getattr(options, name) < least:
                raise BitLMError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
        if options.tokenizer.startswith("train:"):
            raise BitLMError(f"--tokenizer {options.tokenizer}: tasks cannot train one together; train it beforehand")
        if dataset_path(options.output, ".json").exists():
            raise BitLMError(f"output {options.output}.json exists and is not overwritten: choose another output")
        names = ("tokenizer", "block_size", "code_map", "bos_token", "eos_token", "pattern")
        return cls(
            output=str(Path(options.output).absolute()),
            # Hub names and tokenizers that are no path stay as they are.
            inputs=[_absolute(name) for name in options.input],
            tasks=options.tasks,
            encoding={name: getattr(options, name) for name in names}
            | {"tokenizer": _absolute(options.tokenizer), "code_map": options.code_map and _absolute(options.code_map)},
            reading={"text_key": options.text_key, "paragraphs": options.paragraphs},
            workers=options.workers,
            time=options.time,
            partition=options.partition,
            memory_gb=options.memory_gb,
            job_name=options.job_name,
        )

    def describe(self) -> str:
        """What each task would read."""
        corpus = self._corpus()
        shares = [corpus.share(rank, self.tasks) for rank in range(self.tasks)]
        lines = [f"{self.tasks} tasks, then a merge to {self.output}"]
        for rank, share in enumerate(shares):
            size = "" if share.num_input_bytes is None else f", {share.num_input_bytes:,} bytes"
            lines.append(f"  task {rank}: {len(share.sources)} files{size}")
        return "\n".join(lines)

    def submit(self) -> str:
        """Hand both jobs to Slurm; returns the id of the merge, which ends last. Tasks already done are left out.

        Raises:
            BitLMError: datatrove is missing, nothing to read, or Slurm refuses.
        """
        try:
            from datatrove.executor.slurm import SlurmPipelineExecutor

            from megatron_bitlm.data.datatrove_step import BinaryCodeWriter, CorpusReader, MergeShards
        except ModuleNotFoundError as error:
            raise BitLMError(f"preprocessing on Slurm needs datatrove: install the extra `slurm` ({error})") from error
        self._corpus()
        source = {"input": self.inputs, **self.reading}
        pipeline = [
            CorpusReader(self.inputs, **self.reading),
            BinaryCodeWriter(self.output, **self.encoding, settings=source),
        ]
        array = SlurmPipelineExecutor(pipeline, tasks=self.tasks, workers=self.workers, **self._common("shards"))
        merge = SlurmPipelineExecutor([MergeShards(self.output)], tasks=1, depends=array, **self._common("merge"))
        merge.run()
        return str(merge.job_id)

    def _corpus(self) -> Corpus:
        return open_corpus(self.inputs, **self.reading)

    def _common(self, part: str) -> dict[str, Any]:
        return {
            "time": self.time,
            "partition": self.partition,
            "mem_per_cpu_gb": self.memory_gb,
            "job_name": f"{self.job_name}-{part}",
            "qos": None,
            "logging_dir": str(dataset_path(self.output, ".slurm") / part),
            # The tasks start a program of datatrove's, which lies beside this interpreter.
            "env_command": f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"',
        }


def add_preprocess_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bitlm slurm preprocess`."""
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="SOURCE", help="files and folders that every node can read")
    add("--output", required=True, metavar="PREFIX", help="the dataset to write; never overwritten")
    add("--tokenizer", required=True, help="as for `bitlm preprocess`, but not train:bpe")
    add("--tasks", type=int, required=True, help="tasks of the array; whole files go to one task")
    add("--partition", required=True, help="Slurm partition")
    add("--workers", type=int, default=-1, help="tasks that run at once (default: all)")
    add("--time", default="24:00:00", help="time limit of a task (default %(default)s)")
    add("--memory-gb", type=int, default=4, help="memory of a task (default %(default)s)")
    add("--job-name", default="bitlm-preprocess", help="name in the queue (default %(default)s)")
    add("--block-size", type=int, default=4, help="m, tokens generated together (default %(default)s)")
    add("--text-key", default="text", help="key of a record that holds the text (default %(default)s)")
    add("--paragraphs", action="store_true", help="text files hold one document per paragraph")
    for name in ("code-map", "bos-token", "eos-token", "pattern"):
        add(f"--{name}", help="as for `bitlm preprocess`")
    add("--dry-run", action="store_true", help="print what each task would read, submit nothing")


def _absolute(name: str) -> str:
    return str(Path(name).absolute()) if Path(name).exists() else name
