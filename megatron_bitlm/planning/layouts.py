"""Plans of single layouts, and the search for the fastest ones that fit."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.model.flops import TokenFlops
from megatron_bitlm.parallel.config import ParallelConfig
from megatron_bitlm.parallel.hardware import Gpu
from megatron_bitlm.planning.activations import activation_bytes
from megatron_bitlm.planning.balance import StageBalance, balanced_stages, stage_balance
from megatron_bitlm.planning.estimate import Assumptions, StepEstimate, estimate_step
from megatron_bitlm.planning.memory import RankMemory, memory_by_rank
from megatron_bitlm.planning.parameters import ParameterSizes, parameter_sizes
from megatron_bitlm.training.config import RunConfig
from megatron_bitlm.training.flops import run_flops

_MAX_CONTEXT_PARALLEL = 32
_MAX_PIPELINE = 32
_VIRTUAL_STAGES = (None, 2, 3, 4)
_MICRO_BATCHES = (1, 2, 4, 8, 16)
# An estimate cannot tell differences of a percent; a layout with one technique more must be faster by that much.
_HANDICAP = 1.01
# Ways to save memory, the cheapest first: of the layers, and whether the head is recomputed, too.
_RECOMPUTATION = (
    ("none", False),
    ("none", True),
    ("selective", False),
    ("selective", True),
    ("full", False),
    ("full", True),
)


@dataclass(frozen=True)
class Plan:
    """What one layout needs and how fast it may be.

    memory: by pipeline rank; budget_bytes: what a GPU may use; flags: settings that differ from the configuration's.
    """

    config: RunConfig
    memory: list[RankMemory]
    balance: StageBalance
    estimate: StepEstimate
    budget_bytes: float
    flags: list[str]

    @property
    def peak_memory(self) -> RankMemory:
        """Memory of the fullest pipeline rank."""
        return max(self.memory, key=lambda rank: rank.total)

    @property
    def fits(self) -> bool:
        """Whether every rank stays within the budget."""
        return self.peak_memory.total <= self.budget_bytes

    @property
    def command_line(self) -> str:
        """The flags as typed in a shell."""
        return shlex.join(self.flags)


@dataclass
class Planner:
    """Plans layouts of one run on one kind of GPU.

    Attributes:
        config: The run; its parallel section and micro-batch are what the search replaces.
        gpu: From the table of GPUs.
        num_gpus: Of the run.
        vocab_size: Ids of the vocabulary.
        num_bits: K.
        assumptions: Of the estimate.
    """

    config: RunConfig
    gpu: Gpu
    num_gpus: int
    vocab_size: int
    num_bits: int
    assumptions: Assumptions = field(default_factory=Assumptions)
    _sizes: dict[int, ParameterSizes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise BitLMError(f"--gpus must be at least 1, got {self.num_gpus}")
        self.assumptions.validate()
        replace(self.config, parallel=ParallelConfig()).validate()
        self.flops: TokenFlops = run_flops(self.config, self.vocab_size)

    @property
    def fused(self) -> bool:
        """Whether layers are Transformer Engine's, which `auto` takes on a GPU."""
        return self.config.model.implementation != "local"

    @property
    def budget_bytes(self) -> float:
        """Memory a run may use of a GPU."""
        return self.gpu.memory_bytes * (1 - self.assumptions.memory_reserve)

    @property
    def head_layers(self) -> float:
        """The head's FLOPs in transformer layers."""
        num_layers = self.config.model.resolve_backbone().num_layers
        return self.flops.head * num_layers / (self.flops.matrices + self.flops.attention)

    def sizes(self, tensor_parallel_size: int) -> ParameterSizes:
        """Parameters of a tensor-parallel rank."""
        if tensor_parallel_size not in self._sizes:
            self._sizes[tensor_parallel_size] = parameter_sizes(
                self.config.model, self.vocab_size, tensor_parallel_size
            )
        return self._sizes[tensor_parallel_size]

    def check(self, config: RunConfig) -> None:
        """Raise BitLMError where such a run would not start on the planner's GPUs."""
        parallel = config.parallel
        parallel.validate(self.num_gpus, config.model.resolve_backbone())
        config.num_micro_batches(parallel.data_parallel_size(self.num_gpus))
        config.validate()

    def plan(self, config: RunConfig) -> Plan:
        """Plan a configuration as it stands.

        Raises:
            BitLMError: Its layout or batch does not divide.
        """
        self.check(config)
        parallel = config.parallel
        activations = activation_bytes(config, self.vocab_size, fused=self.fused)
        memory = memory_by_rank(config, self.sizes(parallel.tensor_model_parallel_size), activations, self.num_gpus)
        num_layers = config.model.resolve_backbone().num_layers
        layer = (self.flops.matrices + self.flops.attention) / num_layers
        split = parallel.tensor_model_parallel_size
        # The input is lifted on every tensor-parallel rank; the diffusion head is split with sequence parallelism only.
        is_shared = parallel.sequence_parallel or config.model.output == "softmax"
        head = self.head_layers * (1 if is_shared else split)
        return Plan(
            config=config,
            memory=memory,
            balance=stage_balance(parallel, num_layers, head, self.flops.input / layer * split),
            estimate=estimate_step(
                config,
                self.gpu,
                self.assumptions,
                num_gpus=self.num_gpus,
                vocab_size=self.vocab_size,
                memory=memory,
                activations=activations,
            ),
            budget_bytes=self.budget_bytes,
            flags=changed_flags(self.config, config),
        )

    def propose(self, limit: int = 10) -> list[Plan]:
        """The fastest layouts that fit, one for each tensor x pipeline x context size, best first.

        Raises:
            BitLMError: No layout divides the run over so many GPUs, or none fits their memory.
        """
        best: dict[tuple[int, int, int], Plan] = {}
        leanest: Plan | None = None
        for layout in self._layouts():
            for micro_batch_size in _MICRO_BATCHES:
                start = self._with(layout, micro_batch_size)
                if not self._starts(start):
                    continue
                found, tried = self._least_recomputation(start)
                if leanest is None or tried.peak_memory.total < leanest.peak_memory.total:
                    leanest = tried
                if found is None:
                    break  # larger micro-batches need more still
                key = _mesh(layout)
                if key not in best or _handicapped(found) < _handicapped(best[key]):
                    best[key] = found
        if not best:
            raise BitLMError(self._refusal(leanest))
        return sorted(best.values(), key=_handicapped)[:limit]

    def _least_recomputation(self, start: RunConfig) -> tuple[Plan | None, Plan]:
        """The plan with the least recomputation that fits, if any; and the last one tried."""
        for layers, head in _RECOMPUTATION:
            plan = self.plan(_recomputing(start, layers, head))
            if plan.fits:
                return plan, plan
        return None, plan

    def _starts(self, config: RunConfig) -> bool:
        try:
            self.check(config)
        except BitLMError:
            return False
        return True

    def _refusal(self, smallest: Plan | None) -> str:
        if smallest is None:
            return (
                f"no layout divides training.global_batch_size {self.config.training.global_batch_size} samples of "
                f"{self.config.data.sequence_length} tokens over --gpus {self.num_gpus}; use a number of GPUs with "
                "more small factors, or a global batch size that is a multiple of it"
            )
        needed, parallel = smallest.peak_memory.total, smallest.config.parallel
        return (
            f"the run does not fit --gpus {self.num_gpus} {self.gpu.name}: the leanest layout (tensor "
            f"{parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x context "
            f"{parallel.context_parallel_size}) needs {needed / 1e9:.1f} GB of the {self.budget_bytes / 1e9:.1f} GB a "
            "GPU may use; use more GPUs, a smaller model or a shorter data.sequence_length"
        )

    def _layouts(self) -> Iterator[ParallelConfig]:
        """Balanced layouts of all sizes that divide the GPUs and the batch."""
        num_layers = self.config.model.resolve_backbone().num_layers
        for tensor in _divisors(self.num_gpus, self.gpu.gpus_per_node):
            for context in _divisors(self.num_gpus // tensor, _MAX_CONTEXT_PARALLEL):
                ranks = self.num_gpus // tensor // context
                for pipeline in _divisors(ranks, min(_MAX_PIPELINE, num_layers)):
                    if self.config.training.global_batch_size % (ranks // pipeline):
                        continue
                    sharded = ranks // pipeline * context > 1
                    for virtual in _VIRTUAL_STAGES if pipeline > 1 else (None,):
                        layout = ParallelConfig(
                            tensor_model_parallel_size=tensor,
                            pipeline_model_parallel_size=pipeline,
                            virtual_pipeline_model_parallel_size=virtual,
                            context_parallel_size=context,
                            sequence_parallel=tensor > 1,
                            overlap_grad_reduce=sharded,
                            overlap_param_gather=sharded,
                        )
                        layout = balanced_stages(layout, num_layers, self.head_layers)
                        if layout is not None:
                            yield layout

    def _with(self, layout: ParallelConfig, micro_batch_size: int) -> RunConfig:
        config = replace(
            self.config,
            parallel=layout,
            training=replace(self.config.training, micro_batch_size=micro_batch_size),
        )
        # Validation scores whole micro-batches on all replicas.
        share = micro_batch_size * layout.data_parallel_size(self.num_gpus)
        if config.validation.num_samples < share:
            config = replace(config, validation=replace(config.validation, num_samples=share))
        return config


def _mesh(parallel: ParallelConfig) -> tuple[int, int, int]:
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )


def _handicapped(plan: Plan) -> float:
    """Seconds of a step, a little more for every technique in use: each has to earn its complexity."""
    parallel = plan.config.parallel
    techniques = sum(size > 1 for size in _mesh(parallel))
    techniques += parallel.virtual_pipeline_model_parallel_size is not None
    return plan.estimate.seconds * _HANDICAP**techniques


def changed_flags(before: RunConfig, after: RunConfig) -> list[str]:
    """Flags that turn one configuration into another, for `bitlm pretrain CONFIG.yaml`."""
    flags = []
    old, new = _leaves(asdict(before)), _leaves(asdict(after))
    for name, value in new.items():
        if value != old[name]:
            flags += [f"--{name}", _spelled(value)]
    return flags


def _leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def _spelled(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(value)}]" if isinstance(value, (tuple, list)) else str(value)


def _recomputing(config: RunConfig, layers: str, head: bool) -> RunConfig:
    parallel = replace(config.parallel, recompute=layers)
    if layers == "selective":
        parallel = replace(parallel, recompute_modules=("mlp",))
    if head and config.model.output == "diffusion" and not config.model.head.activation_checkpointing:
        lean = replace(config.model.head, activation_checkpointing=True)
        config = replace(config, model=replace(config.model, head=lean))
    return replace(config, parallel=parallel)


def _divisors(number: int, largest: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, largest) + 1) if number % divisor == 0]
