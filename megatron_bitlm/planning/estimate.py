"""How long a step may take: a roofline with stated efficiencies, the pipeline's bubble, and communication.

Every number here is an estimate; its assumptions are in `Assumptions` and printed with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.model.flops import TokenFlops
from megatron_bitlm.parallel.hardware import Gpu
from megatron_bitlm.parallel.stages import layers_by_rank
from megatron_bitlm.planning.activations import ActivationBytes
from megatron_bitlm.planning.memory import RankMemory
from megatron_bitlm.training.config import RunConfig
from megatron_bitlm.training.flops import run_flops

# Kept activations are written once, read once, and so are their gradients.
_ACTIVATION_PASSES = 4
# Bytes a parameter and micro-batch: weights read forward and twice backward, fp32 gradient read and written.
_GRADIENT_BYTES = 8
_WEIGHT_READS = 3
# Bytes an optimizer step moves for each parameter of its shard: gradient, and moments and master read and written.
_UPDATE_BYTES = 4 + 2 * 12


@dataclass(frozen=True)
class Assumptions:
    """What an estimate takes for granted.

    Attributes:
        compute_efficiency: Share of the GPU's peak that matrix products reach. With 0.5 an 8B at 4,096 tokens on one
            H100 node comes out at 41% of peak; Megatron-LM publishes 41-48% for softmax models.
        fp8_efficiency: The same for products in FP8, of the FP8 peak; casts and scales are in it.
        bandwidth_efficiency: Share of the memory's and the links' rates that is reached.
        memory_reserve: Share of the GPU's memory kept free for CUDA, NCCL, libraries and fragmentation.
    """

    compute_efficiency: float = 0.5
    fp8_efficiency: float = 0.4
    bandwidth_efficiency: float = 0.8
    memory_reserve: float = 0.1

    def validate(self) -> None:
        """Raise BitLMError naming the option and its value."""
        for name in ("compute_efficiency", "fp8_efficiency", "bandwidth_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise BitLMError(f"--{name} must lie in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.memory_reserve < 1:
            raise BitLMError(f"--memory_reserve must lie in [0, 1), got {self.memory_reserve}")


@dataclass(frozen=True)
class Communication:
    """Bytes one GPU sends in a step, by kind, on the pipeline rank that sends most."""

    tensor: float
    pipeline: float
    data: float
    context: float


@dataclass(frozen=True)
class StepEstimate:
    """A step: seconds, tokens/s of all GPUs, the share of peak spent on model FLOPs, and where the time goes."""

    seconds: float
    tokens_per_second: float
    model_flops_utilization: float
    seconds_by_part: dict[str, float]
    communication: Communication


@dataclass(frozen=True)
class _Place:
    """Sizes that every part of the estimate uses."""

    config: RunConfig
    gpu: Gpu
    assumptions: Assumptions
    num_gpus: int
    element: int
    tokens: float  # of a micro-batch on one rank
    num_micro_batches: int

    def link(self, stride: int, size: int) -> float:
        """Bytes/s one way that each GPU of a ring gets whose members are `stride` ranks apart.

        A ring over several nodes leaves each through as many network adapters as it has members there.
        """
        gpu = self.gpu
        if stride * size <= gpu.gpus_per_node:
            rate = gpu.nvlink_bandwidth
        else:
            members = max(1, gpu.gpus_per_node // stride)
            rate = min(gpu.nvlink_bandwidth, members * gpu.network_bandwidth)
        return rate * self.assumptions.bandwidth_efficiency


def estimate_step(
    config: RunConfig,
    gpu: Gpu,
    assumptions: Assumptions,
    *,
    num_gpus: int,
    vocab_size: int,
    memory: list[RankMemory],
    activations: ActivationBytes,
) -> StepEstimate:
    """Time of an optimiser step of a validated configuration."""
    parallel = config.parallel
    place = _Place(
        config,
        gpu,
        assumptions,
        num_gpus,
        element=2 if config.training.precision == "bf16" else 4,
        tokens=config.training.micro_batch_size * config.data.sequence_length / parallel.context_parallel_size,
        num_micro_batches=config.num_micro_batches(parallel.data_parallel_size(num_gpus)),
    )
    flops = run_flops(config, vocab_size)
    ranks = layers_by_rank(parallel, config.model.resolve_backbone().num_layers)
    volumes = [_layer_volumes(place, sum(layers)) for layers in ranks]
    compute = [_compute_seconds(place, flops, memory, activations, ranks, rank) for rank in range(len(ranks))]
    tensor = [volume[0] / place.link(1, parallel.tensor_model_parallel_size) for volume in volumes]
    context = [
        volume[1] / place.link(parallel.tensor_model_parallel_size, parallel.context_parallel_size)
        for volume in volumes
    ]
    hop_bytes, hop_seconds = _pipeline_hop(place, activations.boundary)
    busy = [sum(parts) + hop_seconds for parts in zip(compute, tensor, context, strict=True)]
    slowest = max(range(len(busy)), key=busy.__getitem__)
    rounds = place.num_micro_batches
    bubble = (len(ranks) - 1) / (parallel.virtual_pipeline_model_parallel_size or 1) * busy[slowest]
    data_bytes, data_seconds = _data_parallel(place, memory, busy[slowest])
    shards = parallel.data_parallel_size(num_gpus) * parallel.context_parallel_size
    update = _UPDATE_BYTES * max(rank.weights for rank in memory) / place.element
    update /= (shards if parallel.use_distributed_optimizer else 1) * _memory_rate(place)
    seconds = rounds * busy[slowest] + bubble + data_seconds + update
    total = config.training.global_batch_size * config.data.sequence_length
    return StepEstimate(
        seconds=seconds,
        tokens_per_second=total / seconds,
        model_flops_utilization=flops.total * total / (seconds * num_gpus * gpu.peak(config.training.precision)),
        seconds_by_part={
            "compute": rounds * compute[slowest],
            "tensor parallel": rounds * tensor[slowest],
            "context parallel": rounds * context[slowest],
            "pipeline messages": rounds * hop_seconds,
            "pipeline bubble": bubble,
            "data parallel": data_seconds,
            "update": update,
        },
        communication=Communication(
            tensor=rounds * max(volume[0] for volume in volumes),
            pipeline=rounds * hop_bytes,
            data=data_bytes,
            context=rounds * max(volume[1] for volume in volumes),
        ),
    )


def _memory_rate(place: _Place) -> float:
    return place.gpu.memory_bandwidth * place.assumptions.bandwidth_efficiency


def _recomputed_share(config: RunConfig) -> float:
    """Forward FLOPs of a layer's matrices that recomputation repeats, as a share."""
    parallel, b = config.parallel, config.model.resolve_backbone()
    if parallel.recompute == "full":
        if parallel.recompute_method == "block":
            return min(1.0, parallel.recompute_num_layers * parallel.pipeline_model_parallel_size / b.num_layers)
        return 1.0
    if parallel.recompute == "selective" and "mlp" in parallel.recompute_modules:
        return 3 * b.hidden_size * b.ffn_hidden_size * b.num_layers / b.num_matrix_parameters
    return 0.0


def _compute_seconds(
    place: _Place,
    flops: TokenFlops,
    memory: list[RankMemory],
    activations: ActivationBytes,
    ranks: list[list[int]],
    rank: int,
) -> float:
    """Forward and backward of one micro-batch on a pipeline rank: matrix products, and bytes moved for the rest."""
    config, parallel = place.config, place.config.parallel
    num_layers, split = config.model.resolve_backbone().num_layers, parallel.tensor_model_parallel_size
    share = _recomputed_share(config)
    again_attention = parallel.recompute == "full" or (
        parallel.recompute == "selective" and "core_attn" in parallel.recompute_modules
    )
    matrices = flops.matrices * (1 + share / 3)
    attention = flops.attention * (1 + again_attention / 3)
    count, last = sum(ranks[rank]), rank == len(ranks) - 1
    fp8 = config.training.fp8
    low = matrices * count / num_layers / split * _fp8_share(config)
    spent = (matrices + attention) * count / num_layers / split - low
    moved = count * activations.whole_layer * _ACTIVATION_PASSES * (1 + share / 2)
    if rank == 0:
        spent += flops.input  # every tensor-parallel rank lifts the codes itself
        moved += activations.input * _ACTIVATION_PASSES
    if last:
        again = config.model.recomputes_head
        # Without sequence parallelism every tensor-parallel rank runs the whole head; a softmax they always share.
        is_shared = parallel.sequence_parallel or config.model.output == "softmax"
        head = flops.head * (1 + again / 3) / (split if is_shared else 1)
        in_fp8 = fp8.enabled and fp8.head and config.model.output == "diffusion"
        low, spent = (low + head, spent) if in_fp8 else (low, spent + head)
        layers = config.model.head.num_layers * activations.head_layer if again else 0.0
        moved += (activations.head + layers * 1.5) * _ACTIVATION_PASSES
    parameters = memory[rank].weights / place.element
    moved += parameters * (_WEIGHT_READS * place.element + _GRADIENT_BYTES)
    seconds = spent / (place.gpu.peak(config.training.precision) * place.assumptions.compute_efficiency)
    if low:
        seconds += low / (place.gpu.peak("fp8") * place.assumptions.fp8_efficiency)
    return place.tokens * seconds + moved / _memory_rate(place)


def _fp8_share(config: RunConfig) -> float:
    """Share of the backbone's layers whose products run in FP8."""
    fp8, num_layers = config.training.fp8, config.model.resolve_backbone().num_layers
    kept = fp8.num_bf16_layers_at_start + fp8.num_bf16_layers_at_end
    return max(0, num_layers - kept) / num_layers if fp8.enabled else 0.0


def _layer_volumes(place: _Place, num_layers: int) -> tuple[float, float]:
    """Bytes a GPU sends for `num_layers` layers of one micro-batch, tensor-parallel and context-parallel."""
    parallel, b = place.config.parallel, place.config.model.resolve_backbone()
    ranks, sharers = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    hidden = place.tokens * b.hidden_size * place.element
    # Two all-reduces forward and two backward, of two passes each; with sequence parallelism each is a gather and a
    # scatter, and backward gathers the inputs of two matrices again. Recomputation repeats the forward ones.
    passes = (10 if parallel.sequence_parallel else 8) + 4 * (parallel.recompute == "full")
    keys = 2 * place.tokens * b.num_query_groups * b.head_dim * place.element / ranks
    # Keys and values are gathered forward, their gradients scattered backward.
    gathers = 2 + (parallel.recompute == "full")
    return num_layers * passes * hidden * (ranks - 1) / ranks, num_layers * gathers * keys * (sharers - 1)


def _pipeline_hop(place: _Place, boundary: float) -> tuple[float, float]:
    """Bytes a rank sends for one micro-batch, and the seconds of it that nothing hides."""
    parallel = place.config.parallel
    ranks, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    if ranks == 1:
        return 0.0, 0.0
    sent = 2 * chunks * boundary
    # The interleaved schedule overlaps its messages with computation.
    return sent, 0.0 if chunks > 1 else sent / place.link(place.num_gpus // ranks, ranks)


def _data_parallel(place: _Place, memory: list[RankMemory], micro_batch_seconds: float) -> tuple[float, float]:
    """Bytes a GPU sends for gradients and weights in a step, and the seconds of it that nothing hides."""
    parallel = place.config.parallel
    shards = parallel.data_parallel_size(place.num_gpus) * parallel.context_parallel_size
    share = (shards - 1) / shards
    gradients = max(rank.gradients for rank in memory) * share
    weights = max(rank.weights for rank in memory) * share
    if not parallel.use_distributed_optimizer:
        gradients, weights = 2 * gradients, 0.0
    rate = place.link(parallel.tensor_model_parallel_size, shards)
    reduce, gather = gradients / rate, weights / rate
    # Hidden behind the backward pass of the last micro-batch, and the forward pass of the first.
    if parallel.overlap_grad_reduce:
        reduce = max(0.0, reduce - micro_batch_seconds * 2 / 3)
    if parallel.overlap_param_gather:
        gather = max(0.0, gather - micro_batch_seconds / 3)
    return gradients + weights, reduce + gather
