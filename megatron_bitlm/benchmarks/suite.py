"""Everything that wants a GPU, by one command on one GPU: the tests marked `gpu`, then the benchmarks, then a report.

Each part runs in a process of its own, so that it finds the GPU's memory empty and cannot take the others down with it.
What is finished stays in the report's folder; the same command goes on from there after an interruption.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bitlm.benchmarks.harness import BenchmarkConfig
from megatron_bitlm.benchmarks.report import check_output, default_output, describe_device, make_report, publish
from megatron_bitlm.benchmarks.suite_report import markdown
from megatron_bitlm.data.files import write_atomic
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.model.build import HAVE_TE

_TESTS = Path(__file__).parents[2] / "tests"
_FP8_CAPABILITY = (8, 9)
_TESTS_NAME = "tests"
_ATTENTION_BACKENDS = "[flash,flash_eager,flash_attn2,flash_attn3,transformer_engine,flex]"


@dataclass(kw_only=True)
class SuiteBenchmark(BenchmarkConfig):
    """The whole suite; every part takes the repetitions given here.

    Attributes:
        tests: Run the tests marked `gpu` first; they lie beside the package's sources.
        only: Names of the parts to run; all by default.
        timeout_minutes: Longest time of a part.
        num_warmup: Turns of every variant that are not counted.
        num_repetitions: Turns that are.
    """

    tests: bool = True
    only: list[str] | None = None
    timeout_minutes: float = 20.0
    num_warmup: int = 3
    num_repetitions: int = 10


@dataclass(frozen=True)
class Part:
    """One benchmark of the suite: a name for its files, the benchmark, and its options."""

    name: str
    benchmark: str
    options: tuple[str, ...]


def bench_suite(settings: SuiteBenchmark, output: Path | None = None) -> dict[str, Any]:
    """Runs tests and benchmarks, and writes ``output`` (JSON), beside it a .md and a folder with the parts' own files.

    Raises:
        BitLMError: No GPU, an unknown part, no tests here, an ``output`` that exists; and at the end, when the report
            is written, where a part failed.
    """
    output = output or default_output("suite")
    check_output(output)
    settings.validate()
    if not torch.cuda.is_available():
        raise BitLMError(
            "the suite is for a GPU, and PyTorch finds no CUDA device here; on a CPU run its parts, such as "
            "`bitlm bench step`, by themselves"
        )
    if settings.tests and not _TESTS.is_dir():
        raise BitLMError(f"{_TESTS}: the tests are not here; run from a checkout of the sources, or set tests to false")
    device = torch.device("cuda", 0)
    with_fp8 = HAVE_TE and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY
    parts = chosen_parts(settings, with_fp8)
    folder = output.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe_device(device)
    outcomes: dict[str, Any] = {}
    if settings.tests:
        outcomes[_TESTS_NAME] = run_tests(folder, settings.timeout_minutes)
    for part in parts:
        outcomes[part.name] = run_part(part, folder, settings)
    facts = {"with_fp8": with_fp8, "transformer_engine": HAVE_TE, "parts": outcomes}
    report = make_report("suite", settings, machine, None, facts)
    text = markdown(report)
    write_atomic(output.with_suffix(".md"), text.encode())
    publish(report, text, output)
    failed = [name for name, found in outcomes.items() if found["error"] is not None]
    if failed:
        raise BitLMError(f"{', '.join(failed)} failed; see the .log files in {folder} (the report has the rest)")
    return report


def chosen_parts(settings: SuiteBenchmark, with_fp8: bool) -> list[Part]:
    """The parts to run, in order.

    Raises:
        BitLMError: `only` names one that does not exist.
    """
    parts = all_parts(with_fp8)
    known = [part.name for part in parts]
    for name in settings.only or []:
        if name not in known:
            raise BitLMError(f"only: there is no part {name!r} here; choose among {', '.join(known)}")
    return [part for part in parts if settings.only is None or part.name in settings.only]


def all_parts(with_fp8: bool) -> list[Part]:
    """Attention at three lengths, packed and not; the head at two widths; steps at the 0.6B shape and an 8B slice."""
    parts = []
    for sequence_length in (2048, 4096, 8192):
        for document_tokens in (0, 512):
            name = f"attention-{sequence_length}" + ("-packed" if document_tokens else "")
            sizes = {"seq_len": sequence_length, "batch_size": 16_384 // sequence_length, "dtype": "bfloat16"}
            heads = {"num_heads": 16, "num_kv_heads": 8, "head_dim": 128}
            documents = {"mean_document_tokens": document_tokens, "backends": _ATTENTION_BACKENDS}
            parts.append(_part(name, "attention", **sizes, **heads, **documents))
    for hidden_size in (1024, 4096):
        parts.append(_part(f"head-{hidden_size}", "head", hidden_size=hidden_size, num_tokens=8192))
    small = {"preset": "0.6B", "num_layers": 0, "sequence_length": 4096, "micro_batch_size": 2, "num_micro_batches": 2}
    # 4 of 36 layers: all of them in FP8, as 34 of 36 are in the whole model.
    slice_ = {"preset": "8B", "num_layers": 4, "sequence_length": 4096, "num_micro_batches": 2, "fp8_bf16_layers": 0}
    parts.append(_part("step-0.6b", "step", **small, variants="[softmax,bitlm]"))
    parts.append(_part("step-8b-slice", "step", **slice_, variants="[softmax,bitlm]"))
    if with_fp8:
        parts.append(_part("step-0.6b-fp8", "step", **small, variants="[bitlm,bitlm_fp8]"))
        parts.append(_part("step-8b-slice-fp8", "step", **slice_, variants="[bitlm,bitlm_fp8]"))
        # Two vocabulary tables and their moments twice over would not fit beside each other with more layers.
        tables = {**slice_, "num_layers": 2, "num_micro_batches": 1}
        parts.append(_part("step-8b-slice-softmax-fp8", "step", **tables, variants="[softmax_fp8,bitlm_fp8]"))
    return parts


def run_part(part: Part, folder: Path, settings: SuiteBenchmark) -> dict[str, Any]:
    """The part's report, from its file if it is there; `error` says in words what went wrong, else it is None."""
    path = folder / f"{part.name}.json"
    if not path.exists():
        turns = ["--num_warmup", str(settings.num_warmup), "--num_repetitions", str(settings.num_repetitions)]
        command = ["-m", "megatron_bitlm.cli", "bench", part.benchmark, *part.options, *turns, "--output", str(path)]
        error = _run(command, folder / f"{part.name}.log", settings.timeout_minutes)
        if not path.exists():
            return {"error": error or "it wrote no report", "report": None}
    return {"error": None, "report": json.loads(path.read_text())}


def run_tests(folder: Path, timeout_minutes: float) -> dict[str, Any]:
    """Numbers of tests that passed, failed and were skipped; `error` as in `run_part`."""
    path = folder / f"{_TESTS_NAME}.xml"
    if not path.exists():
        command = ["-m", "pytest", "-m", "gpu", str(_TESTS), "-ra", f"--junitxml={path}"]
        error = _run(command, folder / f"{_TESTS_NAME}.log", timeout_minutes, cwd=_TESTS.parent)
        if not path.exists():
            return {"error": error or "pytest wrote no report"}
    return read_test_report(path)


def read_test_report(path: Path) -> dict[str, Any]:
    """Counts of a JUnit file, and the names of what failed."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    ran = len(cases) - skipped
    error = f"{len(failed)} tests failed" if failed else (None if ran else "no test ran")
    return {"error": error, "num_passed": ran - len(failed), "num_skipped": skipped, "failed": names}


def _run(arguments: Sequence[str], log: Path, timeout_minutes: float, cwd: Path | None = None) -> str | None:
    """Runs Python with its output in ``log``; what went wrong, in words, or None."""
    print(f"suite: {log.stem} ...", file=sys.stderr, flush=True)
    with open(log, "ab") as stream:
        try:
            done = subprocess.run(
                [sys.executable, *arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=timeout_minutes * 60,
                cwd=cwd,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout_minutes:g} minutes"
    if done.returncode == 0:
        return None
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"status {done.returncode}: {lines[-1] if lines else 'no output'}"


def _part(name: str, benchmark: str, **options: object) -> Part:
    flat = (text for key, value in options.items() for text in (f"--{key}", str(value)))
    return Part(name, benchmark, tuple(flat))
