"""`bitlm bench WHAT`: each benchmark with its own options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

from jsonargparse import ArgumentParser

from megatron_bitlm.benchmarks.harness import BenchmarkConfig
from megatron_bitlm.benchmarks.report import default_output
from megatron_bitlm.errors import BitLMError

# name: (module, class of its settings, function of settings and output file, description)
_BENCHMARKS = {
    "attention": (
        "attention",
        "AttentionBenchmark",
        "bench_attention",
        "block-causal attention against masked and plain causal SDPA, forward and backward",
    ),
    "head": ("head", "HeadBenchmark", "bench_head", "the diffusion head against the softmax it replaces"),
    "step": ("step", "StepBenchmark", "bench_step", "whole training steps of BitLM against the softmax baseline"),
    "decode": ("decode", "DecodeBenchmark", "bench_decode", "decoding with BitLM against the softmax baseline"),
    "checkpoint": (
        "checkpoint",
        "CheckpointBenchmark",
        "bench_checkpoint",
        "the stall of training by a save in the background against one that it waits for",
    ),
    "preprocess": (
        "preprocess",
        "PreprocessBenchmark",
        "bench_preprocess",
        "text to dataset against the recipe of Megatron-LM's preprocess_data.py, in one process",
    ),
    "loader": (
        "loader",
        "LoaderBenchmark",
        "bench_loader",
        "loading of samples against megatron-core's GPT dataset: tokens per second, start-up, memory",
    ),
    "suite": ("suite", "SuiteBenchmark", "bench_suite", "tests and benchmarks of one GPU, in one report"),
}


def run_bench(arguments: list[str]) -> None:
    """Runs the benchmark that `arguments` name, and writes its figures to a new file.

    Raises:
        BitLMError: An unknown benchmark, settings that do not fit, or an output file that exists.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        _overview().parse_args(arguments or ["--help"])
    name, *rest = arguments
    settings, output = parse_benchmark(name, rest)
    module_name, _, function_name, _ = _BENCHMARKS[name]
    run: Callable = getattr(_module(module_name), function_name)
    run(settings, output or default_output(name))


def parse_benchmark(name: str, arguments: list[str]) -> tuple[BenchmarkConfig, Path | None]:
    """Settings of a benchmark, and the output file if one is named.

    Raises:
        BitLMError: An unknown benchmark.
        argparse.ArgumentError: An unknown option, or a value of the wrong type.
    """
    if name not in _BENCHMARKS:
        raise BitLMError(f"there is no benchmark {name!r}; choose one of {', '.join(_BENCHMARKS)}")
    module_name, settings_name, _, description = _BENCHMARKS[name]
    parser = ArgumentParser(
        prog=f"bitlm bench {name}",
        description=f"Times {description}. Variants take turns in one process.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--output", help="JSON file for the figures, never overwritten (default: a new one)")
    settings_class = getattr(_module(module_name), settings_name)
    parser.add_class_arguments(settings_class, None)
    values = vars(parser.parse_args(arguments))
    output = values.pop("output")
    return settings_class(**values), Path(output) if output else None


def _module(name: str) -> ModuleType:
    return import_module(f"megatron_bitlm.benchmarks.{name}")


def _overview() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:12} {entry[-1]}" for name, entry in _BENCHMARKS.items())
    return argparse.ArgumentParser(
        prog="bitlm bench",
        usage="bitlm bench WHAT [options]",
        description="Compares variants that take turns in one process; prints medians, quartiles and ratios, and "
        "writes JSON.",
        epilog=f"benchmarks:\n{listing}\n\n`bitlm bench WHAT --help` lists its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
