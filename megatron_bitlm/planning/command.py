"""`bitlm plan`: what a run needs on a number of GPUs, and the layouts worth trying."""

from __future__ import annotations

import argparse
import json

from megatron_bitlm.data.card import read_card
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.parallel.hardware import find_gpu, gpu_names
from megatron_bitlm.planning.estimate import Assumptions
from megatron_bitlm.planning.layouts import Plan, Planner
from megatron_bitlm.planning.report import as_json, as_text
from megatron_bitlm.training.config import RunConfig

_QWEN3_VOCAB_SIZE = 151_669


def plan_parser() -> argparse.ArgumentParser:
    """Options of the planner; what it does not know is left for the run's configuration."""
    parser = argparse.ArgumentParser(
        prog="bitlm plan",
        usage="bitlm plan CONFIG.yaml --gpus N [--gpu NAME] [options] [--section.field value ...]",
        description="Memory, FLOPs, communication and likely speed of a run on N GPUs, and the layouts worth trying. "
        "Needs no GPU and starts nothing. Settings of the configuration are changed as for `bitlm pretrain`.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    assumed = Assumptions()
    parser.add_argument("--gpus", type=int, help="how many GPUs")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(gpu_names())} (default h100)")
    parser.add_argument("--top", type=int, default=8, help="layouts to list (default 8)")
    parser.add_argument("--detail", type=int, default=1, help="row to show in detail; 0: the file's own layout")
    parser.add_argument("--vocab_size", type=int, help="ids of the vocabulary (default: the dataset's, or Qwen3's)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--compute_efficiency",
        type=float,
        default=assumed.compute_efficiency,
        help=f"share of the peak that matrix products reach (default {assumed.compute_efficiency})",
    )
    parser.add_argument(
        "--fp8_efficiency",
        type=float,
        default=assumed.fp8_efficiency,
        help=f"the same for products in FP8 (default {assumed.fp8_efficiency})",
    )
    parser.add_argument(
        "--bandwidth_efficiency",
        type=float,
        default=assumed.bandwidth_efficiency,
        help=f"share of memory and link rates that is reached (default {assumed.bandwidth_efficiency})",
    )
    parser.add_argument(
        "--memory_reserve",
        type=float,
        default=assumed.memory_reserve,
        help=f"share of the GPU's memory kept free (default {assumed.memory_reserve})",
    )
    return parser


def run_plan(config: RunConfig, options: argparse.Namespace) -> None:
    """Print the plan of a run.

    Raises:
        BitLMError: An option out of range, an unknown GPU, or a run that no layout fits.
    """
    if options.gpus is None:
        raise BitLMError("--gpus is missing: say how many GPUs to plan for")
    if options.top < 1 or not 0 <= options.detail <= options.top:
        raise BitLMError(f"--detail {options.detail} must lie in 0..--top, and --top {options.top} be at least 1")
    vocab_size = _vocab_size(config, options.vocab_size)
    planner = Planner(
        config,
        find_gpu(options.gpu),
        options.gpus,
        vocab_size,
        num_bits=(vocab_size - 1).bit_length(),
        assumptions=Assumptions(
            compute_efficiency=options.compute_efficiency,
            fp8_efficiency=options.fp8_efficiency,
            bandwidth_efficiency=options.bandwidth_efficiency,
            memory_reserve=options.memory_reserve,
        ),
    )
    own = planner.plan(config) if options.detail == 0 else None
    plans = planner.propose(options.top)
    if options.json:
        print(json.dumps(as_json(planner, [own, *plans] if own else plans), indent=2))
    else:
        print(as_text(planner, plans, *_detailed(plans, own, options.detail)))


def _detailed(plans: list[Plan], own: Plan | None, number: int) -> tuple[Plan, str]:
    if own is not None:
        return own, "the configuration's own layout"
    number = min(number, len(plans))
    return plans[number - 1], f"layout {number}"


def _vocab_size(config: RunConfig, given: int | None) -> int:
    if given is not None:
        if given < 2:
            raise BitLMError(f"--vocab_size must be at least 2, got {given}")
        return given
    if config.data.paths:
        return read_card(config.data.paths[0]).vocab_size
    return _QWEN3_VOCAB_SIZE
