"""Memory of every pipeline rank, by part."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_bitlm.parallel.stages import layers_by_rank
from megatron_bitlm.planning.activations import ActivationBytes
from megatron_bitlm.planning.parameters import ParameterSizes
from megatron_bitlm.training.config import RunConfig

# The distributed optimizer's flat buffers start every parameter at a multiple of this many elements, and end at a
# multiple of the next one and of the number of data-parallel ranks.
_PARAMETER_ALIGNMENT = 64
_BUFFER_ALIGNMENT = 128
_FP32_BYTES = 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one pipeline rank (alike on all its tensor- and data-parallel ranks).

    activations: what waits for the backward pass, of all micro-batches in flight; head_activations: the head's and the
    loss's; workspace: what the backward pass needs on top at its fullest moment.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head_activations: float
    workspace: float

    @property
    def total(self) -> float:
        """All parts."""
        return (
            self.weights + self.gradients + self.optimizer + self.activations + self.head_activations + self.workspace
        )


def memory_by_rank(
    config: RunConfig, sizes: ParameterSizes, activations: ActivationBytes, num_gpus: int
) -> list[RankMemory]:
    """Memory of every pipeline rank of a configuration whose layout has been validated.

    Args:
        config: The run.
        sizes: Its parameters on one tensor-parallel rank.
        activations: Of one of its micro-batches.
        num_gpus: Of the run.
    """
    parallel = config.parallel
    replicas = parallel.data_parallel_size(num_gpus)
    num_micro_batches = config.num_micro_batches(replicas)
    ranks = layers_by_rank(parallel, sizes.num_layers)
    shards = replicas * parallel.context_parallel_size
    return [_rank(config, sizes, activations, ranks, rank, num_micro_batches, shards) for rank in range(len(ranks))]


def state_bytes(config: RunConfig, chunks: list[list[int]], shards: int) -> tuple[float, float, float]:
    """Weights, gradients and optimizer state of a rank.

    Args:
        config: For precision and whether the optimizer is distributed.
        chunks: Elements of every parameter, by model chunk.
        shards: Ranks that share the optimizer's state.
    """
    element = 2 if config.training.precision == "bf16" else 4
    distributed = config.parallel.use_distributed_optimizer
    num_parameters = sum(map(sum, chunks))
    buffers = sum(_padded(sizes, shards) for sizes in chunks) if distributed else num_parameters
    moments = 2 * _FP32_BYTES
    master = _FP32_BYTES if config.training.precision == "bf16" else 0
    state = (moments + master) * num_parameters / (shards if distributed else 1)
    return element * buffers, _FP32_BYTES * buffers, state


def in_flight(rank: int, num_ranks: int, num_chunks: int, num_micro_batches: int) -> list[int]:
    """Micro-batches of every chunk whose activations a pipeline rank holds at once, at its fullest."""
    if num_chunks == 1:
        return [min(num_micro_batches, num_ranks - rank)]
    warmup = 2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks
    counts = [0] * num_chunks
    for position in range(min(warmup + 1, num_micro_batches * num_chunks)):
        counts[position // num_ranks % num_chunks] += 1
    return counts


def _padded(sizes: list[int], shards: int) -> int:
    """Elements of a flat buffer of such parameters; they are laid out from the last to the first."""
    end = 0
    for size in reversed(sizes):
        end = math.ceil(end / _PARAMETER_ALIGNMENT) * _PARAMETER_ALIGNMENT + size
    divisor = math.lcm(shards, _BUFFER_ALIGNMENT)
    return math.ceil(end / divisor) * divisor


def _rank(
    config: RunConfig,
    sizes: ParameterSizes,
    activations: ActivationBytes,
    ranks: list[list[int]],
    rank: int,
    num_micro_batches: int,
    shards: int,
) -> RankMemory:
    layers, first, last = ranks[rank], rank == 0, rank == len(ranks) - 1
    ends = [(first and chunk == 0, last and chunk == len(layers) - 1) for chunk in range(len(layers))]
    chunks = [
        sizes.of_chunk(count, first=begins, last=finishes)
        for count, (begins, finishes) in zip(layers, ends, strict=True)
    ]
    weights, gradients, optimizer = state_bytes(config, chunks, shards)
    held = in_flight(rank, len(ranks), len(layers), num_micro_batches)
    kept = sum(
        number * _chunk_bytes(config, activations, count, begins=begins, finishes=finishes)
        for number, count, (begins, finishes) in zip(held, layers, ends, strict=True)
    )
    head = activations.head if last else 0.0
    return RankMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept,
        head_activations=head,
        workspace=_workspace(config, activations, max(layers), last=last),
    )


def _chunk_bytes(
    config: RunConfig, activations: ActivationBytes, num_layers: int, *, begins: bool, finishes: bool
) -> float:
    """Kept of one micro-batch of a chunk, without the head."""
    parallel = config.parallel
    layers = num_layers * activations.layer
    if parallel.recompute == "full" and parallel.recompute_method == "block":
        recomputed = min(num_layers, parallel.recompute_num_layers)
        layers = recomputed * activations.boundary + (num_layers - recomputed) * activations.whole_layer
    end = 0.0 if finishes else activations.boundary
    return layers + activations.chunk + end + (activations.input if begins else 0.0)


def _workspace(config: RunConfig, activations: ActivationBytes, num_layers: int, *, last: bool) -> float:
    """On top of what is kept: gradients inside a layer, and what recomputation brings back.

    The head's activations are gone when the layers' backward pass starts, so the larger need of the two counts.
    """
    parallel = config.parallel
    recomputed = 0.0
    if parallel.recompute == "full":
        layers = parallel.recompute_num_layers if parallel.recompute_method == "uniform" else 1
        recomputed = min(num_layers, layers) * activations.whole_layer
    elif parallel.recompute == "selective":
        recomputed = activations.whole_layer - activations.layer
    backbone = recomputed + activations.layer_gradients if num_layers else 0.0
    if not last:
        return backbone
    head = activations.head_gradients
    if config.model.recomputes_head:
        head += activations.head_layer
    return max(head, backbone - activations.head)
