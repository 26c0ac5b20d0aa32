"""How a run is spread over processes: the layout, its checks, and the process groups."""

import datetime
import os
import random
from dataclasses import dataclass
from typing import Literal, Protocol

import megatron.core
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.parallel.cpu import install_cpu_support
from megatron_bitlm.parallel.mends import install_mends

_SUPPORTED_MEGATRON = "0.16."
# Pipeline stages get seeds this far apart (tensor-parallel ranks, which megatron-core offsets by one each,
# fit between).
_SEED_STRIDE_BETWEEN_STAGES = 100
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ModelShape(Protocol):
    """What the layout has to divide."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int


@dataclass
class ParallelConfig:
    """The parallel layout of a run; processes that none of the sizes claim become data-parallel replicas.

    Attributes:
        tensor_model_parallel_size: ranks that share every weight matrix.
        pipeline_model_parallel_size: ranks that share the layers.
        virtual_pipeline_model_parallel_size: model chunks a pipeline rank holds (interleaved schedule), or
            None.
        context_parallel_size: ranks that share every sequence, each two chunks of it; attention gathers the keys and
            values of the whole sequence.
        sequence_parallel: split the activations between the weight matrices over the tensor-parallel ranks,
            too.
        use_distributed_optimizer: shard the optimizer's state over the data-parallel ranks.
        overlap_grad_reduce: reduce gradients while the backward pass still runs.
        overlap_param_gather: gather the updated parameters while the forward pass already runs.
        num_layers_in_first_pipeline_stage: layers of the first stage, where the split is uneven.
        num_layers_in_last_pipeline_stage: layers of the last stage, which also holds the head.
        pipeline_model_parallel_layout: megatron-core's layout string, such as "Et*11|t*10|t*10|t*5L".
        recompute: which activations are computed again in the backward pass instead of stored.
        recompute_method: for "full": "uniform" chunks of layers, or "block", the first ones of each stage.
        recompute_num_layers: for "full": layers in a chunk, or layers of a stage.
        recompute_modules: for "selective": parts of a layer, of core_attn, layernorm and mlp.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    pipeline_model_parallel_layout: str | None = None
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_num_layers: int = 1
    recompute_modules: tuple[str, ...] = ("core_attn",)

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model that ``world_size`` processes hold.

        Raises:
            BitLMError: where ``world_size`` is no multiple of the model-parallel size.
        """
        if world_size % self.model_parallel_size:
            raise BitLMError(
                f"{world_size} processes cannot be divided into copies of a model of tensor "
                f"{self.tensor_model_parallel_size} x pipeline {self.pipeline_model_parallel_size} x "
                f"context {self.context_parallel_size} = {self.model_parallel_size} processes; start a "
                f"multiple of {self.model_parallel_size}"
            )
        return world_size // self.model_parallel_size

    def validate(self, world_size: int, model: ModelShape | None = None) -> None:
        """Checks the layout against the number of processes and, where given, the model.

        Raises:
            BitLMError: names the first setting that does not fit, and its value.
        """
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            if getattr(self, name) < 1:
                raise BitLMError(f"parallel.{name} is {getattr(self, name)}; it must be at least 1")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise BitLMError(
                "parallel.sequence_parallel is on with tensor_model_parallel_size 1; it splits activations "
                "over the tensor-parallel ranks, so raise that size or switch it off"
            )
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise BitLMError(
                "parallel.overlap_param_gather is on, which needs use_distributed_optimizer and "
                "overlap_grad_reduce on as well"
            )
        if self.recompute == "full" and self.recompute_num_layers < 1:
            raise BitLMError(
                f"parallel.recompute_num_layers is {self.recompute_num_layers}; it must be at least 1"
            )
        self.data_parallel_size(world_size)
        if model is not None:
            self._validate_tensor_parallel(model)
        self._validate_pipeline(model)

    def validate_sequence(self, sequence_length: int, block_size: int) -> None:
        """Checks that every rank's share of a sequence is whole blocks.

        Args:
            sequence_length: S, tokens of a sample.
            block_size: m.

        Raises:
            BitLMError: names the settings, the length, and what it must be a multiple of.
        """
        if sequence_length % block_size:
            raise BitLMError(
                f"data.sequence_length {sequence_length} is not divisible by model.block_size {block_size}"
            )
        context, tensor = self.context_parallel_size, self.tensor_model_parallel_size
        if context > 1 and sequence_length % (2 * context * block_size):
            raise BitLMError(
                f"parallel.context_parallel_size is {context}: each rank holds two chunks of whole blocks of "
                f"{block_size}, so data.sequence_length must be a multiple of 2 x {context} x {block_size} = "
                f"{2 * context * block_size}, got {sequence_length}"
            )
        if self.sequence_parallel and sequence_length % (context * tensor * block_size):
            raise BitLMError(
                f"parallel.sequence_parallel shares each sequence over {context * tensor} ranks in whole blocks of "
                f"{block_size}, so data.sequence_length must be a multiple of {context * tensor * block_size}, got "
                f"{sequence_length}"
            )

    def _validate_tensor_parallel(self, model: ModelShape) -> None:
        size = self.tensor_model_parallel_size
        for name in ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"):
            if getattr(model, name) % size:
                raise BitLMError(
                    f"parallel.tensor_model_parallel_size is {size}, which does not divide the model's "
                    f"{name}, {getattr(model, name)}"
                )

    def _validate_pipeline(self, model: ModelShape | None) -> None:
        size, chunks = self.pipeline_model_parallel_size, self.virtual_pipeline_model_parallel_size
        first, last = self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage
        splits = (chunks, first, last, self.pipeline_model_parallel_layout)
        if size == 1 and any(split is not None for split in splits):
            raise BitLMError(
                "parallel.pipeline_model_parallel_size is 1, so virtual stages, uneven stages and a "
                "pipeline layout have no meaning; remove them or raise the size"
            )
        if chunks is not None and chunks < 2:
            raise BitLMError(
                f"parallel.virtual_pipeline_model_parallel_size is {chunks}; give 2 or more, or none"
            )
        if self.pipeline_model_parallel_layout is not None:
            self._validate_pipeline_layout(model)
            return
        if model is None:
            return
        stages = size - (first is not None) - (last is not None)
        layers = model.num_layers - (first or 0) - (last or 0)
        if layers < 0 or (stages == 0 and layers) or (stages and layers % stages):
            raise BitLMError(
                f"the model's {model.num_layers} layers cannot be spread over {size} pipeline stages"
                + (f" with {first} in the first" if first is not None else "")
                + (f" with {last} in the last" if last is not None else "")
                + "; set num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage or "
                "pipeline_model_parallel_layout"
            )
        per_stage = {first, last, layers // stages if stages else None} - {None}
        if chunks is not None and any(count % chunks for count in per_stage):
            raise BitLMError(
                f"parallel.virtual_pipeline_model_parallel_size is {chunks}, which does not divide the "
                f"layers of every pipeline stage ({sorted(per_stage)})"
            )

    def _validate_pipeline_layout(self, model: ModelShape | None) -> None:
        text = self.pipeline_model_parallel_layout
        try:
            layout = PipelineParallelLayerLayout(text, self.pipeline_model_parallel_size)
            if model is not None:
                layout.validate_layer_layout(num_layers=model.num_layers, mtp_num_layers=0)
        except (AssertionError, ValueError, KeyError) as error:
            raise BitLMError(
                f"parallel.pipeline_model_parallel_layout {text!r} does not fit "
                f"{self.pipeline_model_parallel_size} pipeline stages and the model: {error}"
            ) from error
        chunks = self.virtual_pipeline_model_parallel_size or 1
        if layout.virtual_pipeline_model_parallel_size != chunks:
            raise BitLMError(
                f"parallel.pipeline_model_parallel_layout {text!r} describes "
                f"{layout.virtual_pipeline_model_parallel_size} chunks a rank, but "
                f"virtual_pipeline_model_parallel_size says {chunks}"
            )


@dataclass(frozen=True)
class ParallelState:
    """This process's place in the run."""

    config: ParallelConfig
    process_groups: ProcessGroupCollection
    device: torch.device
    rank: int
    world_size: int
    local_rank: int
    tensor_parallel_rank: int
    pipeline_parallel_rank: int
    data_parallel_rank: int
    data_parallel_size: int

    @property
    def is_main(self) -> bool:
        """True for the one process that prints and writes single files."""
        return self.rank == 0

    @property
    def num_chunks(self) -> int:
        """Model chunks this process holds."""
        return self.config.virtual_pipeline_model_parallel_size or 1

    def virtual_stage(self, chunk: int) -> int | None:
        """megatron-core's ``vp_stage`` of a chunk: None without virtual stages."""
        return chunk if self.config.virtual_pipeline_model_parallel_size else None

    def is_first_stage(self, chunk: int = 0) -> bool:
        """True where a chunk holds the input module."""
        return self.pipeline_parallel_rank == 0 and chunk == 0

    def is_last_stage(self, chunk: int | None = None) -> bool:
        """True where a chunk (by default this process's last) holds the final norm and the head."""
        last_rank = self.pipeline_parallel_rank == self.config.pipeline_model_parallel_size - 1
        return last_rank and chunk in (None, self.num_chunks - 1)


def check_megatron_version() -> None:
    """Refuses a megatron-core this project was not built against.

    Raises:
        BitLMError: names the version found and the one wanted.
    """
    version = megatron.core.__version__
    if not version.startswith(_SUPPORTED_MEGATRON):
        raise BitLMError(
            f"megatron-core {version} is installed, but this version of megatron-bitlm works with "
            f"{_SUPPORTED_MEGATRON}x only; run: pip install 'megatron-core>=0.16.1,<0.17'"
        )


def launched_world_size() -> int:
    """The number of processes this run was started with: torchrun's, or 1.

    Raises:
        BitLMError: where only some of torchrun's variables are set.
    """
    present = [name for name in _TORCHRUN_VARIABLES if name in os.environ]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        return 1
    missing = [name for name in _TORCHRUN_VARIABLES if name not in present]
    if missing:
        raise BitLMError(
            f"the environment sets {', '.join(present)} but not {', '.join(missing)}; start with torchrun, "
            "or unset them for a single process"
        )
    return int(os.environ["WORLD_SIZE"])


def _choose_device() -> tuple[torch.device, int]:
    """This process's device and its rank on the machine; readies megatron-core for a machine without CUDA."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available():
        install_cpu_support()
        return torch.device("cpu"), local_rank
    if local_rank >= torch.cuda.device_count():
        raise BitLMError(
            f"process {local_rank} of this machine has no GPU of its own ({torch.cuda.device_count()} "
            "found); start at most one process a GPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank), local_rank


def _join_processes(world_size: int, backend: str, timeout: datetime.timedelta) -> None:
    if world_size == 1 and "RANK" not in os.environ:
        # A store inside this process: no port to choose, so any number of runs may start on one machine at
        # once.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


def _seed_generators(seed: int) -> None:
    """Generators for whatever draws at run time. Parameters do not: see ``model.initialization``.

    megatron-core sets tensor-parallel ranks apart by itself, but not pipeline stages, which would then repeat
    each other's draws.
    """
    seed += _SEED_STRIDE_BETWEEN_STAGES * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def initialize_parallel(
    config: ParallelConfig, *, seed: int, timeout_minutes: float = 30, model: ModelShape | None = None
) -> ParallelState:
    """Joins the processes that torchrun started (or starts alone), and makes megatron-core's process groups.

    Args:
        config: the layout; it is checked before any process group exists.
        seed: of the run-time generators; tensor-parallel ranks and pipeline stages get their own.
        timeout_minutes: how long a collective may wait for a process that does not come.
        model: where given, the layout is checked against it, too.

    Raises:
        BitLMError: a layout that does not fit, a wrong megatron-core, a half-set environment, or a second
        start.
    """
    check_megatron_version()
    if dist.is_initialized():
        raise BitLMError(
            "torch.distributed is already running in this process; call shutdown_parallel() first"
        )
    world_size = launched_world_size()
    config.validate(world_size, model)
    device, local_rank = _choose_device()
    install_mends()
    timeout = datetime.timedelta(minutes=timeout_minutes)
    _join_processes(world_size, "nccl" if device.type == "cuda" else "gloo", timeout)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
            context_parallel_size=config.context_parallel_size,
            distributed_timeout_minutes=timeout_minutes,
        )
        _seed_generators(seed)
    except BaseException:
        shutdown_parallel()
        raise
    return ParallelState(
        config=config,
        process_groups=ProcessGroupCollection.use_mpu_process_groups(),
        device=device,
        rank=dist.get_rank(),
        world_size=world_size,
        local_rank=local_rank,
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_parallel_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )


def shutdown_parallel() -> None:
    """Ends what ``initialize_parallel`` began, if anything; it may then be called again."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
