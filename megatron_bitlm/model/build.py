"""From settings to model chunks: the one place where a model is put together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from megatron.core.transformer.module import Float16Module

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.attention import backend_obstacle, choose_backend, describe_backend, flash_obstacle
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.head import HeadConfig, check_head_config, head_width
from megatron_bitlm.method.slot_attention import fused_slot_obstacle
from megatron_bitlm.model.backbone import Backbone, block_spec, transformer_config
from megatron_bitlm.model.bitlm import BitLM
from megatron_bitlm.model.fp8 import Fp8Config, head_context, head_linear, require_fp8
from megatron_bitlm.model.initialization import initialize_parameters
from megatron_bitlm.model.inputs import CodeEmbedding, CodeMLP
from megatron_bitlm.model.layout import SequenceLayout
from megatron_bitlm.model.presets import BackboneConfig, backbone_preset
from megatron_bitlm.model.softmax import SoftmaxConfig, SoftmaxLM, causal_layout
from megatron_bitlm.parallel.state import ParallelState

Precision = Literal["fp32", "bf16"]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class BackboneOverrides:
    """Changes to the preset's backbone; null keeps the preset's value.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: Width D.
        ffn_hidden_size: SwiGLU hidden width.
        num_attention_heads: Query heads.
        num_query_groups: Key/value heads.
        head_dim: Channels per head.
        rope_theta: Base of the rotary frequencies.
    """

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = None


@dataclass
class ModelConfig:
    """A BitLM, or the softmax language model on the same backbone.

    Attributes:
        preset: Backbone shape: tiny, 0.6B, 1.7B, 4B or 8B.
        backbone: Changes to it.
        output: `diffusion`, BitLM's head, or `softmax`, the baseline: embedding table, causal attention and a softmax
            over the vocabulary; it has no use for `head`, `input`, `input_hidden_size` and the section `objective`.
        block_size: m, tokens denoised jointly; the dataset must have been made with the same.
        head: The diffusion head.
        softmax: The softmax's tables.
        input: `mlp` on codes (BitLM eq. 7) or `embedding`, a table by id (ablation).
        input_hidden_size: Hidden width of the code MLP; null means 4 D.
        attention_backend: `flash` is causal flash attention by PyTorch's own kernel and a correction inside the blocks;
            `flash_attn2`, `flash_attn3` and `transformer_engine` take the causal kernel of these packages;
            `flash_eager` composes the correction of PyTorch's operators on a GPU too; `flex` is FlexAttention and
            `dense` a mask. `auto` takes the fastest that runs, and says at the start what it took.
        implementation: Layers from `local` torch parts or `transformer_engine`; `auto` takes Transformer Engine on a
            GPU where it is installed, and says at the start what it took.
    """

    preset: str = "tiny"
    backbone: BackboneOverrides = field(default_factory=BackboneOverrides)
    output: Literal["diffusion", "softmax"] = "diffusion"
    block_size: int = 4
    head: HeadConfig = field(default_factory=HeadConfig)
    softmax: SoftmaxConfig = field(default_factory=SoftmaxConfig)
    input: Literal["mlp", "embedding"] = "mlp"
    input_hidden_size: int | None = None
    attention_backend: Literal[
        "auto", "dense", "flash", "flash_eager", "flash_attn2", "flash_attn3", "transformer_engine", "flex"
    ] = "auto"
    implementation: Literal["auto", "local", "transformer_engine"] = "auto"

    def resolve_backbone(self) -> BackboneConfig:
        """The preset with its overrides."""
        changes = {name: value for name, value in asdict(self.backbone).items() if value is not None}
        return replace(backbone_preset(self.preset), **changes)

    def validate(self) -> None:
        """Raise BitLMError naming the setting and its value."""
        backbone = self.resolve_backbone()
        backbone.validate()
        if self.output not in ("diffusion", "softmax"):
            raise BitLMError(f"model.output must be diffusion or softmax, got {self.output!r}")
        self.softmax.validate()
        if self.block_size < 1:
            raise BitLMError(f"model.block_size must be at least 1, got {self.block_size}")
        if self.input_hidden_size is not None and self.input_hidden_size < 1:
            raise BitLMError(f"model.input_hidden_size must be positive, got {self.input_hidden_size}")
        try:
            check_head_config(self.head, head_width(self.head, backbone.hidden_size))
        except ValueError as error:
            raise BitLMError(f"model.head: {error}") from error

    @property
    def attention_block_size(self) -> int:
        """Tokens that see each other: m, or 1 in the causal baseline."""
        return 1 if self.output == "softmax" else self.block_size

    @property
    def recomputes_head(self) -> bool:
        """Whether backward runs the diffusion head's layers again."""
        return self.output == "diffusion" and self.head.activation_checkpointing


def build_chunks(
    config: ModelConfig,
    state: ParallelState,
    *,
    code: BinaryCode,
    bos_id: int,
    eos_id: int,
    precision: Precision,
    seed: int,
    fp8: Fp8Config | None = None,
) -> list[Backbone | Float16Module]:
    """This rank's model chunks on its device, initialised alike in every layout (bf16 ones wrapped for casting).

    `fp8` says which matrix products run in FP8; None, as in generation, for none.

    Raises:
        BitLMError: A setting that cannot be built.
    """
    config.validate()
    backbone = config.resolve_backbone()
    implementation = resolve_implementation(config, state.device)
    if fp8 is not None:
        require_fp8(fp8, implementation)
    megatron = transformer_config(backbone, state.config, precision=precision, implementation=implementation, fp8=fp8)
    _check_attention(config, state.device, megatron.params_dtype)
    chunks = []
    for index in range(state.num_chunks):
        stage = state.virtual_stage(index)
        first = state.is_first_stage(index)
        spec = block_spec(
            megatron,
            block_size=config.attention_block_size,
            attention_backend=config.attention_backend,
            implementation=implementation,
            vp_stage=stage,
        )
        place: dict[str, Any] = {
            "code": code,
            "block_size": config.block_size,
            "bos_id": bos_id,
            "eos_id": eos_id,
            "backbone": backbone,
            "pre_process": first,
            "post_process": state.is_last_stage(index),
            "vp_stage": stage,
            "pg_collection": state.process_groups,
        }
        if config.output == "softmax":
            chunk = SoftmaxLM(megatron, spec, tables=config.softmax, **place)
        else:
            lift = build_input(config, code, backbone.hidden_size, megatron.params_dtype) if first else None
            chunk = BitLM(
                megatron,
                spec,
                head=config.head,
                head_linear=head_linear(megatron, implementation),
                head_context=partial(head_context, megatron) if fp8 is not None and fp8.head else nullcontext,
                input_module=lift,
                **place,
            )
        initialize_parameters(chunk, seed)
        chunk = chunk.to(state.device)
        chunks.append(Float16Module(megatron, chunk) if precision == "bf16" else chunk)
    return chunks


def model_config(settings: dict[str, Any]) -> ModelConfig:
    """The `model` section of a checkpoint's flat settings.

    Raises:
        BitLMError: A setting this release does not know.
    """
    config = ModelConfig()
    for name, value in settings.items():
        section, _, rest = name.partition(".")
        if section != "model":
            continue
        target: Any = config
        *path, last = rest.split(".")
        for part in path:
            target = getattr(target, part, None)
        known = {f.name for f in fields(target)} if is_dataclass(target) else set()
        if last not in known or is_dataclass(getattr(target, last)):
            raise BitLMError(f"the checkpoint's setting {name} is unknown to this release of megatron-bitlm")
        setattr(target, last, value)
    return config


def build_input(config: ModelConfig, code: BinaryCode, hidden_size: int, dtype: torch.dtype) -> torch.nn.Module:
    """The module that lifts codes to the backbone's width."""
    if config.input == "embedding":
        return CodeEmbedding(code, hidden_size, dtype=dtype)
    return CodeMLP(code.num_bits, config.input_hidden_size or 4 * hidden_size, hidden_size, dtype=dtype)


def batch_layout(
    config: ModelConfig,
    cu_seqlens: torch.Tensor | Sequence[int] | None,
    *,
    batch_size: int,
    sequence_length: int,
    device: torch.device | str,
) -> SequenceLayout:
    """How the model of `config` reads packed samples: by blocks, or as the baseline token by token.

    Args:
        config: Of the model.
        cu_seqlens: Offsets of the documents in the flattened rows, multiples of m, as `SequenceLayout.from_batch`.
        batch_size, sequence_length: B and S of the micro-batch.
        device: Of the model.
    """
    if config.output == "softmax":
        return causal_layout(
            cu_seqlens,
            batch_size=batch_size,
            sequence_length=sequence_length,
            block_size=config.block_size,
            device=device,
        )
    return SequenceLayout.from_batch(cu_seqlens, batch_size, sequence_length, config.block_size, device=device)


def unwrap(chunk: torch.nn.Module) -> Any:
    """The `BitLM` or `SoftmaxLM` inside DDP and precision wrappers."""
    while not isinstance(chunk, Backbone):
        chunk = chunk.module
    return chunk


def resolve_implementation(config: ModelConfig, device: torch.device) -> Literal["local", "transformer_engine"]:
    """What `implementation: auto` means on a device: Transformer Engine on a GPU where it is installed, else local."""
    if config.implementation != "auto":
        return config.implementation
    return "transformer_engine" if device.type == "cuda" and HAVE_TE else "local"


def describe_choices(
    config: ModelConfig, device: torch.device, precision: Precision, fp8: Fp8Config | None = None
) -> str:
    """The kernels that the `auto` settings chose, in words."""
    layers = resolve_implementation(config, device)
    reason = ", Transformer Engine is not installed" if device.type == "cuda" and not HAVE_TE else ""
    dtype, head_dim = PRECISIONS[precision], config.resolve_backbone().head_dim
    attention = config.attention_backend
    if attention == "auto":
        attention = choose_backend(device, dtype, head_dim)
    obstacle = flash_obstacle(device, dtype, head_dim) if attention == "dense" else None
    why = f" ({obstacle})" if obstacle and config.attention_backend == "auto" else ""
    if fp8 is not None and fp8.enabled:
        precision = f"{precision} with FP8 products ({fp8.recipe}, {fp8.format})"
    slots = "" if config.output == "softmax" else f", {_describe_slots(device, dtype, config.block_size)}"
    return f"on {device}, {precision}: {layers} layers{reason}, {describe_backend(attention, device)}{why}{slots}"


def _describe_slots(device: torch.device, dtype: torch.dtype, block_size: int) -> str:
    obstacle = fused_slot_obstacle(device, dtype, block_size)
    if obstacle is None:
        return "attention of the head's slots in Triton"
    return f"attention of the head's slots through PyTorch{f' ({obstacle})' if device.type == 'cuda' else ''}"


def _check_attention(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    obstacle = backend_obstacle(config.attention_backend, device, dtype, config.resolve_backbone().head_dim)
    if obstacle is not None:
        raise BitLMError(
            f"model.attention_backend is {config.attention_backend}, which cannot run: {obstacle}; set it to auto"
        )
