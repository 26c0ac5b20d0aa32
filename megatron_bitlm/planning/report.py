"""Plans as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_bitlm.model.flops import TokenFlops
from megatron_bitlm.planning.estimate import Assumptions
from megatron_bitlm.planning.layouts import Plan, Planner
from megatron_bitlm.planning.memory import RankMemory

_MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "head_activations", "workspace")
_GB, _GFLOP, _PERCENT = 1e9, 1e9, 100


def as_json(planner: Planner, plans: list[Plan]) -> dict[str, Any]:
    """Everything the text says, in bytes, FLOPs and seconds."""
    return {
        "gpu": asdict(planner.gpu),
        "num_gpus": planner.num_gpus,
        "vocab_size": planner.vocab_size,
        "assumptions": asdict(planner.assumptions),
        "parameters": planner.sizes(1).counts(),
        "flops_per_token": asdict(planner.flops),
        "head_layers": planner.head_layers,
        "memory_budget_bytes": planner.budget_bytes,
        "layouts": [_plan_json(plan) for plan in plans],
    }


def as_text(planner: Planner, plans: list[Plan], detailed: Plan, title: str) -> str:
    """The report: model, table of layouts, one layout in detail, assumptions."""
    sections = [
        _model_section(planner),
        _table_section(planner, plans),
        _detail_section(detailed, title),
        _assumption_section(planner),
    ]
    return "\n\n".join(sections)


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "flags": plan.flags,
        "parallel": asdict(plan.config.parallel),
        "micro_batch_size": plan.config.training.micro_batch_size,
        "fits": plan.fits,
        "memory_bytes_by_rank": [asdict(rank) | {"total": rank.total} for rank in plan.memory],
        "stages": asdict(plan.balance) | {"imbalance": plan.balance.imbalance},
        "estimate": asdict(plan.estimate),
    }


def _model_section(planner: Planner) -> str:
    counts, flops = planner.sizes(1).counts(), planner.flops
    parameters = ", ".join(f"{part} {_count(number)}" for part, number in counts.items())
    lines = [
        f"parameters       {_count(sum(counts.values()))}: {parameters}",
        f"FLOPs per token  {flops.total / _GFLOP:.2f} G: {_flops(flops)}",
        f"head             {planner.head_layers:.1f} layers' worth of FLOPs, on the last pipeline stage",
    ]
    return "\n".join(lines)


def _table_section(planner: Planner, plans: list[Plan]) -> str:
    heading = ("", "TP", "PP", "VPP", "CP", "DP", "micro", "recompute", "GB/GPU", "tokens/s", "per GPU", "MFU")
    rows = [heading] + [_row(planner, number, plan) for number, plan in enumerate(plans, start=1)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    title = f"layouts for {planner.num_gpus} {planner.gpu.name}, best first (estimates)"
    flags = [f"{number}: {plan.command_line}" for number, plan in enumerate(plans, start=1)]
    return "\n".join([title, *lines, "", "flags for `bitlm pretrain`, after the configuration's name:", *flags])


def _row(planner: Planner, number: int, plan: Plan) -> tuple[str, ...]:
    parallel, estimate = plan.config.parallel, plan.estimate
    again = parallel.recompute if parallel.recompute != "selective" else "+".join(parallel.recompute_modules)
    if plan.config.model.recomputes_head:
        again = "head" if again == "none" else f"{again}+head"
    return (
        str(number),
        str(parallel.tensor_model_parallel_size),
        str(parallel.pipeline_model_parallel_size),
        str(parallel.virtual_pipeline_model_parallel_size or 1),
        str(parallel.context_parallel_size),
        str(parallel.data_parallel_size(planner.num_gpus)),
        str(plan.config.training.micro_batch_size),
        again,
        f"{plan.peak_memory.total / _GB:.1f}",
        f"{estimate.tokens_per_second:,.0f}",
        f"{estimate.tokens_per_second / planner.num_gpus:,.0f}",
        f"{estimate.model_flops_utilization:.2f}",
    )


def _detail_section(plan: Plan, title: str) -> str:
    balance, estimate, sent = plan.balance, plan.estimate, plan.estimate.communication
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines = [f"{title}: {verdict} ({plan.peak_memory.total / _GB:.1f} of {plan.budget_bytes / _GB:.1f} GB)"]
    lines.append("memory per GPU, GB")
    names = [part.replace("_", " ").rjust(11) for part in (*_MEMORY_PARTS, "total")]
    heading = "  stage  " + "  ".join(names)
    lines.append(heading)
    lines += [_memory_row(number, rank) for number, rank in enumerate(plan.memory)]
    layers = " | ".join("+".join(map(str, chunks)) for chunks in balance.layers)
    cost = " | ".join(f"{value:.1f}" for value in balance.cost)
    lines.append(
        f"stages           layers {layers}; cost with input and head {cost}; imbalance {balance.imbalance:.2f}"
    )
    volumes = {"TP": sent.tensor, "PP": sent.pipeline, "DP": sent.data, "CP": sent.context}
    lines.append("sent per step    " + ", ".join(f"{kind} {volume / _GB:.2f} GB" for kind, volume in volumes.items()))
    parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in estimate.seconds_by_part.items() if seconds > 0)
    lines.append(f"seconds a step   {estimate.seconds:.3f}: {parts}")
    return "\n".join(lines)


def _memory_row(number: int, rank: RankMemory) -> str:
    values = [getattr(rank, part) for part in (*_MEMORY_PARTS, "total")]
    widths = [max(11, len(part)) for part in (*_MEMORY_PARTS, "total")]
    return f"  {number:>5}  " + "  ".join(
        f"{value / _GB:>{width}.2f}" for value, width in zip(values, widths, strict=True)
    )


def _assumption_section(planner: Planner) -> str:
    return "\n".join(["assumptions", *(f"- {line}" for line in _assumptions(planner, planner.assumptions))])


def _assumptions(planner: Planner, assumed: Assumptions) -> list[str]:
    config, gpu = planner.config, planner.gpu
    precision = config.training.precision
    layers = "Transformer Engine's" if planner.fused else "plain torch"
    fp8 = config.training.fp8
    low = f" ({assumed.fp8_efficiency * _PERCENT:.0f}% of {gpu.peak('fp8') / 1e12:.0f} in FP8)" if fp8.enabled else ""
    return [
        f"{gpu.name}: {gpu.peak(precision) / 1e12:.0f} TFLOP/s in {precision}, {gpu.memory_bytes / _GB:.0f} GB at "
        f"{gpu.memory_bandwidth / 1e12:.2f} TB/s, NVLink {gpu.nvlink_bandwidth / _GB:.0f} and network "
        f"{gpu.network_bandwidth / _GB:.0f} GB/s each way, {gpu.gpus_per_node} GPUs a node",
        f"matrix products reach {assumed.compute_efficiency * _PERCENT:.0f}% of the peak{low}, memory and links "
        f"{assumed.bandwidth_efficiency * _PERCENT:.0f}% of their rates; {assumed.memory_reserve * _PERCENT:.0f}% of "
        "the memory stays free for CUDA, NCCL and fragmentation",
        f"samples of {config.data.sequence_length} tokens, each one document; {config.training.global_batch_size} "
        f"samples a step; vocabulary of {planner.vocab_size} ids, {planner.num_bits} bits; "
        f"noisy copies a block: {config.objective.samples_per_block}; {layers} layers",
        "tensor- and context-parallel messages are not hidden; gradients and weights hide behind one micro-batch where "
        "overlap is on; loading data, logging, validation and checkpoints take no time",
    ]


def _flops(flops: TokenFlops) -> str:
    return ", ".join(f"{part} {value / _GFLOP:.2f}" for part, value in asdict(flops).items())


def _count(number: float) -> str:
    return f"{number / 1e9:.3f} G" if number >= 1e9 else f"{number / 1e6:.1f} M"
