"""Balanced pipeline stages: the head on the last one is worth several layers.

A stage's cost is counted in layers; the head counts `head_layers` of them, its FLOPs over a layer's (megatron-core's
`account_for_loss_in_pipeline_split` would count it as exactly one).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from megatron_bitlm.parallel.config import ParallelConfig
from megatron_bitlm.parallel.stages import layers_by_rank


@dataclass(frozen=True)
class StageBalance:
    """Cost of every pipeline rank in layers, the head's with the last.

    `imbalance` is the most loaded rank over the mean: the factor by which the pipeline is slower than an even one.
    """

    head_layers: float
    layers: list[list[int]]
    cost: list[float]

    @property
    def imbalance(self) -> float:
        """Largest over mean cost, at least 1."""
        return max(self.cost) * len(self.cost) / sum(self.cost)


def stage_balance(parallel: ParallelConfig, num_layers: int, head_layers: float, input_layers: float) -> StageBalance:
    """How a layout's pipeline ranks are loaded; `head_layers` and `input_layers` are costs in layers."""
    layers = layers_by_rank(parallel, num_layers)
    cost = [float(sum(chunks)) for chunks in layers]
    cost[0] += input_layers
    cost[-1] += head_layers
    return StageBalance(head_layers, layers, cost)


def balanced_stages(parallel: ParallelConfig, num_layers: int, head_layers: float) -> ParallelConfig | None:
    """The layout with its layers spread evenly, the head's weight included; None if there are fewer layers than chunks.

    Without virtual stages `num_layers_in_last_pipeline_stage` is enough where it is as good as any other spread; else
    a `pipeline_model_parallel_layout` is written.
    """
    plain = replace(
        parallel,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
        pipeline_model_parallel_layout=None,
    )
    ranks, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    if ranks == 1:
        return plain
    counts = balanced_counts(ranks * virtual, num_layers, head_layers)
    if counts is None:
        return None
    written = replace(plain, pipeline_model_parallel_layout=layout_string(counts))
    if virtual > 1:
        return written
    costs = [(max(counts[0], counts[-1] + head_layers), 1, written)]
    for last in range(1, num_layers + 1):
        each, left_over = divmod(num_layers - last, ranks - 1)
        if each and not left_over:
            uneven = replace(plain, num_layers_in_last_pipeline_stage=last if last != each else None)
            costs.append((max(each, last + head_layers), 0, uneven))
    return min(costs, key=lambda item: item[:2])[2]


def balanced_counts(num_chunks: int, num_layers: int, head_layers: float) -> list[int] | None:
    """Layers of every chunk, the head behind the last, with the smallest largest cost; None if a chunk had none.

    Only the last chunk may hold no layer but the head.
    """
    best: tuple[float, list[int]] | None = None
    for last in range(num_layers + 1):
        each, more = divmod(num_layers - last, num_chunks - 1)
        if each == 0:
            break
        cost = max(each + (more > 0), last + head_layers)
        # Of two spreads that cost the same, the one with more layers beside the head spares memory elsewhere.
        if best is None or cost < best[0] or math.isclose(cost, best[0]):
            best = (cost, [each + (chunk < more) for chunk in range(num_chunks - 1)] + [last])
    return best[1] if best else None


def layout_string(counts: list[int]) -> str:
    """megatron-core's layout string: `Et*11|t*10|t*10|t*5L` for [11, 10, 10, 5]; long runs as `(t*5|)*6`."""
    stages = ["t" if count == 1 else f"t*{count}" if count else "" for count in counts]
    text = f"E{stages[0]}|"
    for stage, run in itertools.groupby(stages[1:-1]):
        length = len(list(run))
        text += f"({stage}|)*{length}" if length > 2 else f"{stage}|" * length
    return f"{text}{stages[-1]}L"
