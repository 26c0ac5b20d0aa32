"""Block-causal attention through FlexAttention: one BlockMask per batch, shared by every layer.

Legend: B batch, S sequence, H query heads, Hk key heads, D head dim, I and J tiles of queries and of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_bitlm.method.attention_layout import BlockCausalLayout

_TILE_TOKENS = 128


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
    """The BlockMask of eq. 16 and the documents; built on first use and kept on ``layout``.

    Which tiles hold a visible pair follows from the documents at the tiles' ends: nothing of size S x S is made.
    """

    def make() -> BlockMask:
        document_bs, block_size = layout.document_ids_on(device), layout.block_size

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key // block_size <= query // block_size) & (document_bs[batch, query] == document_bs[batch, key])

        some, all_pairs = _visible_tiles(document_bs, block_size)
        partial_tiles, full_tiles = (_in_order(tiles) for tiles in (some & ~all_pairs, all_pairs))
        lengths = (layout.seq_len, layout.seq_len)
        return BlockMask.from_kv_blocks(
            *partial_tiles, *full_tiles, BLOCK_SIZE=_TILE_TOKENS, mask_mod=sees, seq_lengths=lengths
        )

    return layout.keep("flex_block_mask", device, make)


def _visible_tiles(document_bs: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Tiles with some visible pair, and those where every pair is visible: bool [B, I, J]."""
    seq_len = document_bs.shape[1]
    starts = torch.arange(0, seq_len, _TILE_TOKENS, device=document_bs.device)
    ends = (starts + _TILE_TOKENS).clamp(max=seq_len) - 1
    # Documents are numbered in order, so a tile's first and last tell which ones it holds.
    first, last = document_bs[:, starts], document_bs[:, ends]
    earlier = starts[None, :] < starts[:, None]
    shared = last[:, None, :] >= first[:, :, None]
    # A block across the border of two tiles lets the first of them see the second.
    later = starts[None, :] > starts[:, None]
    straddled = later & ((starts // block_size)[None, :] == (ends // block_size)[:, None])
    own = straddled | (starts[None, :] == starts[:, None])
    # As PyTorch has it, a tile with rows past the end of the sequence is not a full one.
    whole = (starts + _TILE_TOKENS <= seq_len)[:, None]
    return (earlier & shared) | own, earlier & whole & (first[:, None, :] == last[:, :, None])


def _in_order(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of keys each tile of queries has, int32 [B, 1, I], and their numbers first, int32 [B, 1, I, J]."""
    order = torch.argsort(tiles.int(), dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32).unsqueeze(1), order.int().unsqueeze(1)


def _unfused_flex_attention() -> Callable[..., Tensor]:
    return flex_attention


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)
