"""What a benchmark prints and writes: the machine, the settings, the figures."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from megatron_bitlm import __version__
from megatron_bitlm.benchmarks.harness import BenchmarkConfig, Comparison
from megatron_bitlm.data.files import write_atomic
from megatron_bitlm.data.workers import num_usable_cores
from megatron_bitlm.errors import BitLMError

FORMAT, VERSION = "megatron-bitlm benchmark", 1
DEFAULT_FOLDER = Path("runs/bench")
_PACKAGES = ("megatron-core", "transformer-engine", "flash-attn", "triton", "tokenizers", "tiktoken", "numpy")
_CPU_INFO = Path("/proc/cpuinfo")


def describe_device(device: torch.device) -> dict[str, Any]:
    """The machine as far as it decides a time: CPU, threads, GPU, versions, and how busy it is."""
    found: dict[str, Any] = {
        "device": str(device),
        "cpu": cpu_name(),
        "num_cores": num_usable_cores(),
        "num_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": _versions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "gpu_capability": [properties.major, properties.minor],
            "num_multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found


def cpu_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_line(found: dict[str, Any]) -> str:
    """`describe_device` in one line."""
    place = f"{found['gpu']}, CUDA {found['cuda']}, " if "gpu" in found else ""
    return (
        f"{place}{found['cpu']}, {found['num_cores']} cores, {found['num_threads']} threads, "
        f"torch {found['torch']}, load {found['load_average']:.2f}"
    )


def check_output(output: Path | None) -> None:
    """Refuse a file that exists, before any time is spent.

    Raises:
        BitLMError: It exists.
    """
    if output is not None and output.exists():
        raise BitLMError(f"{output} exists already; name another file for the figures of the benchmark")


def default_output(benchmark: str) -> Path:
    """A file of this moment under runs/bench."""
    return DEFAULT_FOLDER / f"{benchmark}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}.json"


def make_report(
    benchmark: str,
    settings: BenchmarkConfig,
    machine: dict[str, Any],
    comparison: Comparison | None,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A report ready for JSON.

    Args:
        benchmark: Its name.
        settings: What was asked for.
        machine: From `describe_device`, taken before the measurement.
        comparison: The times; None for a benchmark of one thing alone.
        facts: Whatever else was found.
    """
    report: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "benchmark": benchmark,
        "package_version": __version__,
        "settings": dataclasses.asdict(settings),
        "machine": {**machine, "load_average_after": os.getloadavg()[0]},
        "facts": facts or {},
    }
    if comparison is not None:
        report |= {"baseline": comparison.baseline, "variants": comparison.figures()}
    return report


def publish(report: dict[str, Any], text: str, output: Path | None) -> dict[str, Any]:
    """Print the machine and the text, write the report where one is wanted, and return it as it was written.

    Raises:
        BitLMError: The file came into being meanwhile.
    """
    print(device_line(report["machine"]))
    print(text)
    if output is not None:
        check_output(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, (json.dumps(report, indent=1) + "\n").encode())
        print(f"written to {output}")
    return report


def _versions() -> dict[str, str]:
    installed = {}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
