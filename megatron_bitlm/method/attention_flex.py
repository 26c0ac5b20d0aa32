"""Block-causal attention through FlexAttention: one BlockMask per batch, shared by every layer.

Legend: B batch, S sequence, H query heads, Hk key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megatron_bitlm.method.attention_layout import BlockCausalLayout


def flex_block_causal_attention(q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout, scale: float) -> Tensor:
    """q [B, S, H, D], k/v [B, S, Hk, D] -> [B, S, H, D]. Compiled on CUDA; on CPU unfused and forward only.

    Raises:
        ValueError: gradients are wanted on CPU, where FlexAttention has no backward.
    """
    if not q.is_cuda:
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ValueError("FlexAttention has no backward on CPU; use the flash or the dense attention backend")
        q, k, v = q.detach(), k.detach(), v.detach()  # leaves are refused even under no_grad
    attend = _compiled_flex_attention() if q.is_cuda else _unfused_flex_attention()
    mask = block_mask(layout, q.device)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    out = attend(*heads_first, block_mask=mask, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    return out.transpose(1, 2)


def block_mask(layout: BlockCausalLayout, device: torch.device) -> BlockMask:
    """The BlockMask of eq. 16 and the documents; built on first use and kept on ``layout``."""

    def make() -> BlockMask:
        document_bs, block_size = layout.document_ids_on(device), layout.block_size

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key // block_size <= query // block_size) & (document_bs[batch, query] == document_bs[batch, key])

        return create_block_mask(sees, layout.batch_size, None, layout.seq_len, layout.seq_len, device=str(device))

    return layout.keep("flex_block_mask", device, make)


def _unfused_flex_attention() -> Callable[..., Tensor]:
    return flex_attention


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)
