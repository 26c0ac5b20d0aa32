"""The parts of a Qwen3 layer that are ours: RMSNorm, rotary positions and block-causal core attention.

Shape legend: S sequence, B batch, H heads, D channels of a head; megatron-core puts the sequence first, [S,
B, H, D].
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_bitlm.method.attention import block_causal_attention, cached_block_attention
from megatron_bitlm.method.attention_shard import shard_block_causal_attention
from megatron_bitlm.model.layout import SequenceLayout
from megatron_bitlm.parallel.context import gather_keys_values


def _wide(x: Tensor) -> Tensor:
    """At least fp32; float64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _RMSNormFunction(torch.autograd.Function):
    """y = x / rms(x) * w with few passes over memory: torch composes it of seven operations on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = _wide(x)
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(_wide(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = _wide(x) * scale
        grad = _wide(grad)
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad_normed = grad * _wide(weight)
        # d/dx of x/rms: the part of the gradient along x does not change the result.
        along = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = grad_normed.sub_(normed.mul_(along)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32 (Qwen3), for layers without Transformer Engine.

    megatron-core's fallback refuses sequence parallelism; this one marks its weight instead, so that its
    gradients, each from a shard of the sequence, are summed over the tensor-parallel ranks.

    Args:
        config: for the parameters' dtype and the sequence-parallel mark.
        hidden_size: channels, the last dim.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Any shape [..., hidden_size] -> the same shape and dtype."""
        return _RMSNormFunction.apply(x, self.weight, self.eps)


def rotary_tables(positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each [S, B, 1, head_dim / 2], computed in fp32."""
    channels = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (channels / head_dim)
    angles = positions_BS.t().float()[:, :, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


class _RotateFunction(torch.autograd.Function):
    """Turns channel pairs (i, i + D/2) by the angles; backward turns back. Saves nothing but the tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def apply_rotary(x_SBHD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of queries or keys [S, B, H, D]."""
    return _RotateFunction.apply(x_SBHD, *rotary)


class BlockCausalCoreAttention(nn.Module):
    """Core attention of BitLM (eq. 16): all of the own block, all earlier blocks of the own document.

    megatron-core calls it as a core attention. It turns queries and keys itself, with tables made once a
    batch: megatron-core would compute cosines and sines anew in every layer.

    Args:
        config: megatron-core's.
        layer_number: 1-based; names the layer in a cache.
        block_size: M, tokens of a block.
        backend: of `block_causal_attention`.
        softmax_scale: None is 1/sqrt(head_dim).
        pg_collection: process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        block_size: int,
        backend: str = "auto",
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_unused: Any,  # attention and mask types, and how context parallelism communicates
    ) -> None:
        super().__init__()
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.layer_number, self.block_size = layer_number, block_size
        self.backend, self.softmax_scale = backend, softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: SequenceLayout,
        **_unused: Any,
    ) -> Tensor:
        """Queries [S, B, H, D], keys and values [S, B, H_kv, D] before RoPE -> [S, B, H * D].

        With context parallelism S is the rank's share of the row.
        """
        layout = packed_seq_params
        query, key = (apply_rotary(x, layout.rotary) for x in (query, key))
        if self.context_group is not None:
            key, value = gather_keys_values(key, value, self.context_group)
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        cache = layout.kv_cache
        if cache is not None:
            cached_keys, cached_values = cache.append(self.layer_number, key, value)
        if layout.shard is not None:
            out = shard_block_causal_attention(
                query, key, value, shard=layout.shard, backend=self.backend, scale=self.softmax_scale
            )
        elif layout.attention is not None:
            out = block_causal_attention(
                query,
                key,
                value,
                block_size=self.block_size,
                cu_seqlens=layout.attention,
                backend=self.backend,
                scale=self.softmax_scale,
            )
        else:
            out = cached_block_attention(
                query, cached_keys, cached_values, key_stop=cache.key_stop, scale=self.softmax_scale
            )
        return out.flatten(2).transpose(0, 1).contiguous()
