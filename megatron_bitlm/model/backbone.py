"""Qwen3 backbone on megatron-core's TransformerBlock, with block-causal attention (BitLM section 4).

Shape legend: B batch, S sequence, K bits, D hidden; between modules megatron-core puts the sequence first,
[S, B, D].
"""

import dataclasses
import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.model.fp8 import Fp8Config
from megatron_bitlm.model.layers import BlockCausalCoreAttention, RMSNorm, rotary_tables
from megatron_bitlm.model.layout import SequenceLayout
from megatron_bitlm.model.presets import BackboneConfig
from megatron_bitlm.parallel.state import ParallelConfig

Implementation = Literal["local", "transformer_engine"]
Precision = Literal["fp32", "bf16", "fp64"]
_EXTRA_STATE = "_extra_state"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def _fill_with_nan(weight: Tensor) -> None:
    """In place of megatron-core's initialisation; forgetting `initialize_parameters` then shows at once."""
    weight.fill_(float("nan"))


def transformer_config(
    backbone: BackboneConfig,
    parallel: ParallelConfig,
    *,
    precision: Precision = "fp32",
    implementation: Implementation = "local",
    fp8: Fp8Config | None = None,
) -> TransformerConfig:
    """megatron-core's configuration of a backbone.

    Args:
        backbone: shape of the model.
        parallel: layout of the run.
        precision: of parameters and activations: fp32 or bf16; fp64 for comparisons.
        implementation: `local` is plain torch; `transformer_engine` brings its fused kernels.
        fp8: matrix products in FP8; None for none.

    Raises:
        BitLMError: sizes that do not fit together.
    """
    backbone.validate()
    params_dtype = _DTYPES[precision]
    fused = implementation == "transformer_engine"
    virtual = parallel.virtual_pipeline_model_parallel_size
    full = parallel.recompute == "full"
    return TransformerConfig(
        num_layers=backbone.num_layers,
        hidden_size=backbone.hidden_size,
        ffn_hidden_size=backbone.ffn_hidden_size,
        num_attention_heads=backbone.num_attention_heads,
        num_query_groups=backbone.num_query_groups,
        kv_channels=backbone.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=backbone.norm_epsilon,
        qk_layernorm=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_fill_with_nan,
        output_layer_init_method=_fill_with_nan,
        init_method_std=backbone.init_std,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=params_dtype,
        bf16=precision == "bf16",
        pipeline_dtype=params_dtype,
        # Kernels of Apex or Transformer Engine.
        bias_activation_fusion=fused,
        gradient_accumulation_fusion=fused,
        # Of a softmax output; megatron-core's fused kernel gives gradients in bf16 whatever the logits are.
        cross_entropy_loss_fusion=fused and precision == "bf16",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        cuda_graph_scope=[],  # the default, "full", warns that it is deprecated
        # The loss is a sum over all tokens of a step, divided once: equal in every layout.
        calculate_per_token_loss=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
        # Batched sends and receives mismatch silently between two interleaved stages (megatron-core 0.16.1).
        batch_p2p_comm=virtual is None,
        overlap_p2p_comm=virtual is not None,
        # Would free a buffer that an overlapped send still reads.
        deallocate_pipeline_outputs=False,
        recompute_granularity=None if parallel.recompute == "none" else parallel.recompute,
        recompute_method=parallel.recompute_method if full else None,
        recompute_num_layers=parallel.recompute_num_layers if full else None,
        recompute_modules=list(parallel.recompute_modules) if parallel.recompute == "selective" else None,
        **(fp8.megatron_settings() if fp8 else {}),
    )


def block_spec(
    config: TransformerConfig,
    *,
    block_size: int,
    attention_backend: str = "auto",
    implementation: Implementation = "local",
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (of one chunk, with virtual stages). Process groups must exist.

    Args:
        config: from `transformer_config`.
        block_size: M.
        attention_backend: of `method.attention.block_causal_attention`.
        implementation: as given to `transformer_config`.
        vp_stage: chunk of an interleaved schedule, or None.

    Raises:
        BitLMError: where Transformer Engine is wanted but not installed.
    """
    if implementation == "transformer_engine":
        if not gpt_layer_specs.HAVE_TE:
            raise BitLMError(
                "model.implementation is transformer_engine, but Transformer Engine is not installed; "
                "install megatron-bitlm[cuda], or set model.implementation to local"
            )
        layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
        final_norm = gpt_layer_specs.TENorm
    else:
        layer = gpt_layer_specs.get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
        final_norm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = functools.partial(
        BlockCausalCoreAttention, block_size=block_size, backend=attention_backend
    )
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=final_norm)


def _excuse_extra_state(module: nn.Module, incompatible: Any) -> None:
    """Lets weights load strictly though Transformer Engine's layers find nothing of their own among them."""
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if not name.endswith(_EXTRA_STATE)]


class Backbone(MegatronModule):
    """One pipeline stage of the backbone, as megatron-core's schedules want it.

    Args:
        config: from `transformer_config`.
        spec: from `block_spec`.
        backbone: the shape `config` was made from.
        input_module: maps codes [B, S, K] to hidden states [B, S, D]; used on the first stage.
        pre_process: True on the first stage.
        post_process: True on the last stage, which holds the final norm.
        vp_stage: chunk of an interleaved schedule, or None.
        pg_collection: process groups; by default megatron-core's own.

    Its weights are NaN until `initialize_parameters` or a checkpoint fills them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules,
        *,
        backbone: BackboneConfig,
        input_module: nn.Module | None = None,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        if pre_process and input_module is None:
            raise ValueError("the first pipeline stage needs an input module")
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.backbone_config = backbone
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        # Read by megatron-core's schedules and by finalize_model_grads.
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        if pre_process:
            self.input_module = input_module
        self.decoder = TransformerBlock(
            config,
            spec,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        self.register_load_state_dict_post_hook(_excuse_extra_state)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """megatron-core's sharded state of the parameters, without what Transformer Engine adds to it.

        Its layers keep the history of delayed FP8 scaling as a pickle, which no checkpoint of ours may hold. Without it
        a checkpoint also loads with and without Transformer Engine. Other FP8 recipes have no such state.
        """
        state = super().sharded_state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.endswith(_EXTRA_STATE)}

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Takes the hidden states that the stage before sent; called by the schedules."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, codes_BSK: Tensor | None, layout: SequenceLayout) -> Tensor:
        """One micro-batch through this stage's layers.

        Args:
            codes_BSK: +-1 codes of the tokens on the first stage, None elsewhere; with context parallelism those of
                this rank's share of the sequence, `own_layout(layout).shard`.
            layout: documents and positions of the whole micro-batch.

        Returns:
            Hidden states [S, B, D] of these tokens, after the final norm on the last stage; with sequence parallelism
            this tensor-parallel rank's [S / ranks, B, D].

        Raises:
            BitLMError: with sequence parallelism, a sequence that does not divide into whole blocks a rank.
        """
        layout = self.own_layout(layout)
        if self.config.sequence_parallel:
            self._check_shards(layout)
        hidden = None
        if self.pre_process:
            hidden = self._lift(codes_BSK)
        rotary = rotary_tables(
            layout.positions,
            self.backbone_config.head_dim,
            self.backbone_config.rope_theta,
            self.config.params_dtype,
        )
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            packed_seq_params=dataclasses.replace(layout, rotary=rotary),
        )
        if layout.kv_cache is not None:
            layout.kv_cache.finish()
        return hidden

    def _lift(self, codes_BSK: Tensor) -> Tensor:
        """First hidden states [S, B, D]; with sequence parallelism this rank's share of them."""
        hidden = self.input_module(codes_BSK).transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        return hidden

    def own_layout(self, layout: SequenceLayout) -> SequenceLayout:
        """The part of a micro-batch's layout that this context-parallel rank holds."""
        group = self.pg_collection.cp
        return layout.for_context_rank(group.rank(), group.size())

    def _check_shards(self, layout: SequenceLayout) -> None:
        """The head scores whole blocks (a softmax tokens), so every rank's shard must be whole ones."""
        size, length = self.config.tensor_model_parallel_size, layout.positions.shape[1]
        block_size = layout.attention.block_size if layout.attention is not None else length
        if length % (size * block_size):
            raise BitLMError(
                f"with parallel.sequence_parallel, {size} tensor-parallel ranks share a sequence of "
                f"{length} tokens in whole blocks of {block_size}; use a multiple of {size * block_size} "
                "tokens"
            )
