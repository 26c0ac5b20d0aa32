"""The later keys of each block as one Triton kernel each way: the correction of attention_flash.py for CUDA.

Forward merges the softmax over the at most m-1 later keys of a block into the causal out and lse, in place; backward
adds what those pairs contribute to the gradients, in place too, from the MERGED out and lse (the formulas stand in
attention_flash.py). Each program takes a tile of whole blocks of one key head and all query heads that share it, so
that keys and values are read once and their gradients are summed in a fixed order, without atomics. A tile holds many
blocks under one mask: a product of m x m would waste the matrix units more than the masked pairs do.

Importing this module imports Triton. With TRITON_INTERPRET=1 in the environment at import the kernels run on CPU
tensors, which is how they are tested without a GPU.

Legend: T tokens, M slots of a block, H query heads, P key heads, G query heads per key head, D head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK_SIZE = 64
# The smallest matrix product there is. Larger tiles mask more pairs away and leave fewer registers for other programs.
_MIN_TILE_TOKENS = 16
# So many of a tile's elements a warp that nothing spills at head dims of 64 to 256, compiled for sm_80 and sm_90.
_ELEMENTS_PER_WARP = 512
_MAX_WARPS = 8


def merge_later_keys(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block_size: int, scale: float) -> None:
    """Adds the later keys of each block to the causal ``out`` and ``lse``, in place.

    Args:
        q: queries [T, H, D].
        k: keys [T, P, D].
        v: values [T, P, D].
        out: causal attention's output [T, H, D], overwritten by the merged one.
        lse: its natural log of the sum of exponentiated scaled scores, float32 [H, T], overwritten likewise.
        block_size: m; blocks are neighbouring tokens and T is a multiple of m.
        scale: factor of the scores.

    Raises:
        ValueError: a block size that is not 2 to 64, tokens that are not whole blocks, or tensors that are not
            contiguous.
    """
    grid, options = launch(q, k, block_size, (q, k, v, out, lse))
    _merge_kernel[grid](q, k, v, out, lse, q.shape[0], scale, **options)


def add_later_key_grads(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
) -> None:
    """Adds the gradients of the later (query, key) pairs to ``grads`` of q, k and v, in place.

    Args:
        grads: of q [T, H, D], k and v [T, P, D].
        grad_out: gradient of the merged output [T, H, D].
        q: queries [T, H, D].
        k: keys [T, P, D].
        v: values [T, P, D].
        out: the merged output [T, H, D].
        lse: the merged lse, float32 [H, T].
        block_size: m.
        scale: factor of the scores.

    Raises:
        ValueError: as ``merge_later_keys``.
    """
    grid, options = launch(q, k, block_size, (*grads, grad_out, q, k, v, out, lse))
    _grads_kernel[grid](q, k, v, out, lse, grad_out, *grads, q.shape[0], scale, **options)


def launch(
    q: Tensor, k: Tensor, block_size: int, tensors: tuple[Tensor, ...]
) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants of either kernel for q [T, H, D] and k [T, P, D], after checking what they are given."""
    num_tokens, num_heads, head_dim = q.shape
    if not 2 <= block_size <= MAX_BLOCK_SIZE:
        raise ValueError(
            f"the Triton correction takes blocks of 2 to {MAX_BLOCK_SIZE} tokens, got {block_size}; use the attention "
            "backend flash_eager"
        )
    if num_tokens % block_size:
        raise ValueError(f"{num_tokens} tokens are not a whole number of blocks of {block_size}")
    if not all(x.is_contiguous() for x in tensors):
        raise ValueError("the Triton correction takes contiguous tensors")
    tile_tokens = max(_MIN_TILE_TOKENS, triton.next_power_of_2(block_size))
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    used_tokens = tile_tokens // block_size * block_size
    options = {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": k.shape[1],
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim,
        "BLOCK_SIZE": block_size,
        "TILE": tile_tokens,
        "USED": used_tokens,
        "num_warps": min(_MAX_WARPS, max(1, tile_tokens * padded_dim // _ELEMENTS_PER_WARP)),
        # Loading the next head ahead would cost the registers and shared memory of more programs at once.
        "num_stages": 1,
    }
    return (triton.cdiv(num_tokens, used_tokens), k.shape[1]), options


@triton.jit
def _tile(num_tokens, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, USED: tl.constexpr):
    """Tokens of this program's tile, which of its rows are tokens, and which column is a later key of which row."""
    rows = tl.arange(0, TILE)
    tokens = tl.program_id(0).to(tl.int64) * USED + rows
    live = (rows < USED) & (tokens < num_tokens)
    block = rows // BLOCK_SIZE
    later = (block[:, None] == block[None, :]) & (rows[None, :] > rows[:, None]) & live[None, :]
    return tokens, live, later


@triton.jit
def _places(tokens, live, head, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Offsets [TILE, PADDED_DIM] of a head's channels in a tensor [T, NUM_HEADS, HEAD_DIM], and which of them exist."""
    channels = tl.arange(0, PADDED_DIM)
    offsets = (tokens[:, None] * NUM_HEADS + head) * HEAD_DIM + channels[None, :]
    return offsets, live[:, None] & (channels[None, :] < HEAD_DIM)


@triton.jit
def _merge_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    num_tokens,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    USED: tl.constexpr,
):
    tokens, live, later = _tile(num_tokens, BLOCK_SIZE, TILE, USED)
    kv_head = tl.program_id(1)
    kv_at, kv_mask = _places(tokens, live, kv_head, NUM_KV_HEADS, HEAD_DIM, PADDED_DIM)
    k = tl.load(k_ptr + kv_at, mask=kv_mask, other=0.0)
    v = tl.load(v_ptr + kv_at, mask=kv_mask, other=0.0)
    for index in range(NUM_HEADS // NUM_KV_HEADS):
        head = kv_head * (NUM_HEADS // NUM_KV_HEADS) + index
        at, mask = _places(tokens, live, head, NUM_HEADS, HEAD_DIM, PADDED_DIM)
        q = tl.load(q_ptr + at, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(later, scores, float("-inf"))
        lse_at = lse_ptr + head.to(tl.int64) * num_tokens + tokens
        causal_lse = tl.load(lse_at, mask=live, other=0.0)
        # The causal part always holds the token itself, so the peak is finite where there is no later key.
        peak = tl.maximum(causal_lse, tl.max(scores, 1))
        weights = tl.exp(scores - peak[:, None])
        causal_weight = tl.exp(causal_lse - peak)
        total = causal_weight + tl.sum(weights, 1)
        out = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32) * (causal_weight / total)[:, None]
        out += tl.dot((weights / total[:, None]).to(v.dtype), v, input_precision="ieee")
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(lse_at, peak + tl.log(total), mask=live)


@triton.jit
def _grads_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    grad_out_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    num_tokens,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    USED: tl.constexpr,
):
    tokens, live, later = _tile(num_tokens, BLOCK_SIZE, TILE, USED)
    kv_head = tl.program_id(1)
    kv_at, kv_mask = _places(tokens, live, kv_head, NUM_KV_HEADS, HEAD_DIM, PADDED_DIM)
    k = tl.load(k_ptr + kv_at, mask=kv_mask, other=0.0)
    v = tl.load(v_ptr + kv_at, mask=kv_mask, other=0.0)
    grad_k = tl.load(grad_k_ptr + kv_at, mask=kv_mask, other=0.0).to(tl.float32)
    grad_v = tl.load(grad_v_ptr + kv_at, mask=kv_mask, other=0.0).to(tl.float32)
    for index in range(NUM_HEADS // NUM_KV_HEADS):
        head = kv_head * (NUM_HEADS // NUM_KV_HEADS) + index
        at, mask = _places(tokens, live, head, NUM_HEADS, HEAD_DIM, PADDED_DIM)
        q = tl.load(q_ptr + at, mask=mask, other=0.0)
        grad_out = tl.load(grad_out_ptr + at, mask=mask, other=0.0)
        out = tl.load(out_ptr + at, mask=mask, other=0.0)
        lse = tl.load(lse_ptr + head.to(tl.int64) * num_tokens + tokens, mask=live, other=0.0)
        delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        probability = tl.exp(tl.where(later, scores - lse[:, None], float("-inf")))
        grad_v += tl.dot(tl.trans(probability).to(grad_out.dtype), grad_out, input_precision="ieee")
        grad_probability = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
        grad_scores = (probability * (grad_probability - delta[:, None]) * scale).to(q.dtype)
        grad_q = tl.load(grad_q_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad_q += tl.dot(grad_scores, k, input_precision="ieee")
        tl.store(grad_q_ptr + at, grad_q.to(grad_q_ptr.dtype.element_ty), mask=mask)
        grad_k += tl.dot(tl.trans(grad_scores), q, input_precision="ieee")
    tl.store(grad_k_ptr + kv_at, grad_k.to(grad_k_ptr.dtype.element_ty), mask=kv_mask)
    tl.store(grad_v_ptr + kv_at, grad_v.to(grad_v_ptr.dtype.element_ty), mask=kv_mask)
