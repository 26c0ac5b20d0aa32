"""Kills a run again and again at random moments, many of them in the middle of a save, and compares what comes out.

Usage: python -m tools.kill_test --kills 20        (from the repository's root; a few minutes)

The same tiny run is trained twice: once without interruption, once killed by SIGKILL as often as asked and started
again each time by the same command. Every tensor of the last checkpoint (weights, moments, steps) and every record of
metrics.jsonl must be identical. Moments come from a seed. A kill is aimed at a step, at a save (its folder
`.step_*.tmp` appears while it is written), or at the time when a process starts and resumes.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_bitlm.data.preprocess import PreprocessConfig, preprocess
from megatron_bitlm.errors import BitLMError

_TIMINGS = ("seconds", "tokens_per_second", "mfu")
_POLL_INTERVAL_S = 0.0005
AIMS = ("save", "step", "save", "start", "step")  # in turns
_LONGEST_DELAY_S = {"save": 0.03, "step": 0.01, "start": 8.0}
_STEPS_PER_LIFE, _SAVES_PER_LIFE = (2, 12), (1, 3)


@dataclass
class Kill:
    """One life of the run and how it ended.

    Attributes:
        aim: `save`, `step` or `start`.
        reached: The last step in metrics.jsonl.
        newest: Step of the newest complete checkpoint.
        in_a_save: A half-written checkpoint was left.
    """

    aim: str
    reached: int
    newest: int
    in_a_save: bool


@dataclass
class Report:
    """What a series of kills did to a run."""

    kills: list[Kill] = field(default_factory=list)
    num_steps: int = 0
    num_tensors: int = 0
    differing_tensors: list[str] = field(default_factory=list)
    differing_records: int = 0

    @property
    def identical(self) -> bool:
        """Nothing shows that the run was ever interrupted."""
        return not self.differing_tensors and self.differing_records == 0


class Life(Protocol):
    """A started process, as `subprocess.Popen` has it."""

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""

    def send_signal(self, number: int) -> None:
        """Signal it."""

    def wait(self) -> int:
        """Its exit status, negative for a signal."""


def start_command(config: Path, log: Path) -> Life:
    """`bitlm pretrain CONFIG` in a process of its own."""
    with open(log, "a", encoding="utf-8") as stream:
        command = [sys.executable, "-m", "megatron_bitlm.cli", "pretrain", str(config)]
        return subprocess.Popen(command, stdout=stream, stderr=stream)


class Run:
    """A tiny run.

    Args:
        directory: Of the run; its configuration is written beside it.
        settings: Of `bitlm pretrain`.
        start: Begins or resumes the run of a configuration file; may write to the log file.
    """

    def __init__(self, directory: Path, settings: dict, start: Callable[[Path, Path], Life]) -> None:
        self.directory, self.config = directory, directory.with_suffix(".yaml")
        settings = {**settings, "run": {"directory": str(directory), "seed": 1}}
        self.config.write_text(yaml.safe_dump(settings))
        self.checkpoints, self.log = directory / "checkpoints", directory.with_suffix(".log")
        self.start = lambda: start(self.config, self.log)

    def finish(self) -> None:
        """Train to the end.

        Raises:
            BitLMError: The process failed; its log says why.
        """
        if self.start().wait() != 0:
            raise BitLMError(f"the run ended with an error; see {self.log}")

    def records(self) -> list[dict]:
        """metrics.jsonl without what a clock measured, and without a last line that a kill cut off."""
        file = self.directory / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [{key: value for key, value in json.loads(line).items() if key not in _TIMINGS} for line in lines]

    def reached(self) -> int:
        """The last step."""
        return max((record["step"] for record in self.records()), default=0)

    def newest(self) -> int:
        """Step of the newest complete checkpoint, or 0."""
        return max((int(path.parent.name[5:]) for path in self.checkpoints.glob("step_*/meta.json")), default=0)

    def half_written(self) -> list[Path]:
        """Folders of saves that are not complete."""
        return list(self.checkpoints.glob(".step_*.tmp"))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the newest checkpoint, read by torch alone."""
        reader = FileSystemReader(self.checkpoints / f"step_{self.newest():08d}")
        stored = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(item.size, dtype=item.properties.dtype)
            for name, item in stored.items()
            if isinstance(item, TensorStorageMetadata)
        }
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        return tensors


def kill_once(run: Run, generator: random.Random, aim: str) -> Kill:
    """Start the run, and kill it at a random moment.

    Raises:
        BitLMError: It ended before that; train for more steps.
    """
    step = run.newest() + generator.randint(*_STEPS_PER_LIFE)
    num_saves = generator.randint(*_SAVES_PER_LIFE)
    delay_s = generator.uniform(0, _LONGEST_DELAY_S[aim])
    metrics = run.directory / "metrics.jsonl"
    before = _identity(metrics)
    saves: set[str] = set()
    process = run.start()
    while aim != "start" and process.poll() is None:
        if _identity(metrics) != before:  # rewritten when the run was resumed, as what a kill left was removed
            saves |= {path.name for path in run.half_written()}
            reached = aim == "step" and f'"step": {step},' in metrics.read_text()[-4096:]
            if reached or (aim == "save" and len(saves) == num_saves):
                break
        time.sleep(_POLL_INTERVAL_S)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise BitLMError(f"the run ended before it was killed; see {run.log}")
    return Kill(aim, run.reached(), run.newest(), bool(run.half_written()))


def _identity(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def settings_of(prefix: str, num_steps: int, save_interval: int) -> dict:
    """A model of a few thousand parameters."""
    backbone = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}
    backbone |= {"num_query_groups": 2, "head_dim": 16}
    head = {"width": 32, "num_layers": 2, "head_dim": 16, "adaln_init_std": 0.05}
    return {
        "model": {"preset": "tiny", "backbone": backbone, "head": head},
        "data": {"paths": [prefix], "sequence_length": 64, "split": "75,25,0"},
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 3},
        "training": {
            "num_steps": num_steps,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "progress": "lines",
            "log_interval_steps": 1,
        },
        "checkpoint": {"interval_steps": save_interval, "keep_last": 2},
        "validation": {"interval_steps": 7, "num_samples": 8},
    }


def run_kill_test(
    folder: Path,
    *,
    num_kills: int,
    num_steps: int,
    save_interval: int,
    seed: int,
    start: Callable[[Path, Path], Life] = start_command,
) -> Report:
    """Train a run undisturbed and another one through `num_kills` kills, under `folder`, and compare them.

    Raises:
        BitLMError: The run failed by itself, or ended before the last kill.
    """
    folder.mkdir(parents=True)
    text = folder / "text.jsonl"
    words = random.Random(seed)
    lines = (" ".join(words.choices(["bit", "by", "bit", "a", "word"], k=24)) for _ in range(96))
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    preprocess(PreprocessConfig(input=[str(text)], output=str(folder / "data"), tokenizer="bytes", num_workers=1))
    settings = settings_of(str(folder / "data"), num_steps, save_interval)
    whole, killed = (Run(folder / name, settings, start) for name in ("whole", "killed"))
    whole.finish()
    generator = random.Random(seed)
    report = Report(num_steps=num_steps)
    for number in range(num_kills):
        kill = kill_once(killed, generator, AIMS[number % len(AIMS)])
        print(f"kill {number + 1}: {asdict(kill)}", flush=True)
        report.kills.append(kill)
    killed.finish()
    ours, theirs = killed.tensors(), whole.tensors()
    report.num_tensors = len(theirs)
    report.differing_tensors = sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    )
    records = killed.records(), whole.records()
    report.differing_records = sum(a != b for a, b in zip(*records, strict=False)) + abs(
        len(records[0]) - len(records[1])
    )
    return report


def main() -> int:
    """Run from the command line; exit status 1 where the runs differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300, help="of the run; it must outlast the kills (default 300)")
    parser.add_argument("--save-interval", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/kill_test"), help="must not exist")
    options = parser.parse_args()
    if options.folder.exists():
        print(f"{options.folder} exists already; name another --folder", file=sys.stderr)
        return 2
    report = run_kill_test(
        options.folder,
        num_kills=options.kills,
        num_steps=options.steps,
        save_interval=options.save_interval,
        seed=options.seed,
    )
    print(json.dumps({**asdict(report), "identical": report.identical}, indent=1))
    return 0 if report.identical else 1


if __name__ == "__main__":
    sys.exit(main())
