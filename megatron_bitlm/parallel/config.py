"""The parallel layout of a run and its checks, which need no process group."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_bitlm.errors import BitLMError

# Parts of a layer that are computed again under recompute "selective".
_RECOMPUTABLE = ("core_attn", "layernorm", "mlp")


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
        collective_timeout_minutes: how long a process waits in a collective for one that does not come.
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
    collective_timeout_minutes: float = 60.0

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

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
        if not 0 < self.collective_timeout_minutes < math.inf:
            raise BitLMError(
                f"parallel.collective_timeout_minutes is {self.collective_timeout_minutes}; it must be positive"
            )
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
        unknown = sorted(set(self.recompute_modules) - set(_RECOMPUTABLE))
        if self.recompute == "selective" and (unknown or not self.recompute_modules):
            raise BitLMError(
                f"parallel.recompute_modules is {list(self.recompute_modules)}; choose from {', '.join(_RECOMPUTABLE)}"
            )
        if self.recompute == "full" and self.recompute_num_layers < 1:
            raise BitLMError(f"parallel.recompute_num_layers is {self.recompute_num_layers}; it must be at least 1")
        self.data_parallel_size(world_size)
        if model is not None:
            self._validate_tensor_parallel(model)
        self._validate_pipeline(model)

    def validate_micro_batches(self, num_micro_batches: int) -> None:
        """Checks the micro-batches of a step against the pipeline's schedule.

        Raises:
            BitLMError: the interleaved schedule, and micro-batches that do not fill its rounds.
        """
        size = self.pipeline_model_parallel_size
        if self.virtual_pipeline_model_parallel_size is not None and num_micro_batches % size:
            raise BitLMError(
                f"with parallel.virtual_pipeline_model_parallel_size the {size} pipeline stages take micro-batches in "
                f"rounds of {size}, but a step has {num_micro_batches} a data-parallel rank; change "
                "training.global_batch_size or training.micro_batch_size"
            )

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
            raise BitLMError(f"parallel.virtual_pipeline_model_parallel_size is {chunks}; give 2 or more, or none")
        for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise BitLMError(
                    f"parallel.{name} is {count}; give 1 or more (a stage without layers needs "
                    "pipeline_model_parallel_layout)"
                )
        if self.pipeline_model_parallel_layout is not None:
            if first is not None or last is not None:
                raise BitLMError(
                    "parallel.pipeline_model_parallel_layout already says the layers of every stage; remove "
                    "num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage"
                )
            self._validate_pipeline_layout(model)
            return
        if model is None:
            return
        stages = size - (first is not None) - (last is not None)
        layers = model.num_layers - (first or 0) - (last or 0)
        if layers < 0 or bool(layers) != bool(stages) or (stages and layers % stages):
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
