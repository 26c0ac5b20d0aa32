"""Attention inside blocks as one Triton kernel each way, many blocks to a tile.

Importing this module imports Triton. With TRITON_INTERPRET=1 in the environment at import the kernels run on CPU
tensors.

Legend: N blocks, M slots of a block, T = N*M tokens, W width, H heads, D head dim (W = H*D).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# As in attention_triton.py, whose tiles these are.
_MIN_TILE_TOKENS = 16
_ELEMENTS_PER_WARP = 512
_MAX_WARPS = 8


def fused_slot_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """``slot_attention`` of qkv [N, M, 3W] -> [N, M, W]; keeps qkv alone for backward."""
    return _FusedSlotAttention.apply(qkv.contiguous(), num_heads)


class _FusedSlotAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, num_heads: int) -> Tensor:
        """[N, M, 3W] -> [N, M, W]."""
        ctx.save_for_backward(qkv)
        ctx.num_heads = num_heads  # type: ignore[attr-defined]
        out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
        grid, options = launch(qkv, num_heads)
        _forward_kernel[grid](qkv, out, qkv.shape[0] * qkv.shape[1], **options)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor, None]:
        """Gradient of qkv."""
        (qkv,) = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_qkv = torch.empty_like(qkv)
        grid, options = launch(qkv, ctx.num_heads)  # type: ignore[attr-defined]
        _backward_kernel[grid](qkv, grad_out.contiguous(), grad_qkv, qkv.shape[0] * qkv.shape[1], **options)
        return grad_qkv, None


def launch(qkv: Tensor, num_heads: int) -> tuple[tuple[int, int], dict[str, int | float]]:
    """Grid and constants of either kernel for qkv [N, M, 3W]."""
    num_blocks, num_slots, width = qkv.shape
    head_dim = width // 3 // num_heads
    tile_tokens = max(_MIN_TILE_TOKENS, triton.next_power_of_2(num_slots))
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    used_tokens = tile_tokens // num_slots * num_slots
    options: dict[str, int | float] = {
        "SCALE": head_dim**-0.5,
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim,
        "BLOCK_SIZE": num_slots,
        "TILE": tile_tokens,
        "USED": used_tokens,
        "num_warps": min(_MAX_WARPS, max(1, tile_tokens * padded_dim // _ELEMENTS_PER_WARP)),
        "num_stages": 1,
    }
    return (triton.cdiv(num_blocks * num_slots, used_tokens), num_heads), options


@triton.jit
def _load_tile(
    qkv_ptr,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    USED: tl.constexpr,
):
    """Queries, keys and values of this program's tile and head, where they lie in [T, 3, H, D], and which exist."""
    rows = tl.arange(0, TILE)
    tokens = tl.program_id(0).to(tl.int64) * USED + rows
    channels = tl.arange(0, PADDED_DIM)
    mask = ((rows < USED) & (tokens < num_tokens))[:, None] & (channels[None, :] < HEAD_DIM)
    width = NUM_HEADS * HEAD_DIM
    at = tokens[:, None] * (3 * width) + tl.program_id(1) * HEAD_DIM + channels[None, :]
    q = tl.load(qkv_ptr + at, mask=mask, other=0.0)
    k = tl.load(qkv_ptr + at + width, mask=mask, other=0.0)
    v = tl.load(qkv_ptr + at + 2 * width, mask=mask, other=0.0)
    out_at = tokens[:, None] * width + tl.program_id(1) * HEAD_DIM + channels[None, :]
    return q, k, v, at, out_at, mask


@triton.jit
def _probabilities(q, k, SCALE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Softmax over the slots of the own block, [TILE, TILE]; rows that are no tokens make up blocks of their own."""
    block = tl.arange(0, TILE) // BLOCK_SIZE
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
    scores = tl.where(block[:, None] == block[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _forward_kernel(
    qkv_ptr,
    out_ptr,
    num_tokens,
    SCALE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    USED: tl.constexpr,
):
    q, k, v, _, out_at, mask = _load_tile(qkv_ptr, num_tokens, NUM_HEADS, HEAD_DIM, PADDED_DIM, TILE, USED)
    probability = _probabilities(q, k, SCALE, BLOCK_SIZE, TILE)
    out = tl.dot(probability.to(v.dtype), v, input_precision="ieee")
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    qkv_ptr,
    grad_out_ptr,
    grad_qkv_ptr,
    num_tokens,
    SCALE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    USED: tl.constexpr,
):
    q, k, v, at, out_at, mask = _load_tile(qkv_ptr, num_tokens, NUM_HEADS, HEAD_DIM, PADDED_DIM, TILE, USED)
    grad_out = tl.load(grad_out_ptr + out_at, mask=mask, other=0.0)
    probability = _probabilities(q, k, SCALE, BLOCK_SIZE, TILE)
    grad_v = tl.dot(tl.trans(probability).to(grad_out.dtype), grad_out, input_precision="ieee")
    grad_probability = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
    delta = tl.sum(probability * grad_probability, 1)
    grad_scores = (probability * (grad_probability - delta[:, None]) * SCALE).to(q.dtype)
    grad_q = tl.dot(grad_scores, k, input_precision="ieee")
    grad_k = tl.dot(tl.trans(grad_scores), q, input_precision="ieee")
    width = NUM_HEADS * HEAD_DIM
    tl.store(grad_qkv_ptr + at, grad_q.to(grad_qkv_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_qkv_ptr + at + width, grad_k.to(grad_qkv_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_qkv_ptr + at + 2 * width, grad_v.to(grad_qkv_ptr.dtype.element_ty), mask=mask)
