"""Exact block-causal attention at the price of causal attention (BitLM, arXiv 2605.11577, eq. 16).

A token sees every key of its document up to the end of its own block. Causal attention already covers the
keys up to the token itself; missing are the at most m-1 later keys of its block. Softmax over disjoint key
sets merges by log-sum-exp: with s the scaled scores of the later keys,

    lse = logaddexp(lse_causal, logsumexp(s)),   out = exp(lse_causal - lse) out_causal + exp(s - lse) V.

The gradient of either part needs nothing but the merged out and lse: P = exp(s - lse), D = dout . out,
dS = P (dout V^T - D). So the stock causal backward is handed the merged pair (with either of the two unmerged
the gradients are wrong) and the later pairs of each block are added to what it returns.

On CUDA the in-block part is one Triton kernel each way (attention_triton.py). Elsewhere, and by name there too, it is
composed of PyTorch's operators: the products of all query heads with all key heads of a block are formed in one small
matrix product, [m*H, d] x [d, m*Hk], of which the matching heads are a diagonal view: no transposed copies, and with
few key heads the superfluous products cost less than the copies would. With many, on CPU, each key head and
its query heads first become a row of the batch of their own.

Legend: B batch, S sequence, T = B*S tokens, N blocks, M slots of a block, H query heads, P key heads (Hk),
G query heads per key head (H = P*G), D head dim.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_bitlm.method.attention_causal import ATEN_KERNEL, CPU_KERNEL, CausalKernel, heads_of
from megatron_bitlm.method.attention_layout import BlockCausalLayout
from megatron_bitlm.method.attention_packages import PACKAGE_KERNELS, package_obstacle

FLASH_BACKENDS = ("flash", "flash_eager", "flash_attn2", "flash_attn3", "transformer_engine")
_MIN_CUDNN = 90600
_MAX_CUDA_HEAD_DIM = {"transformer_engine": 128}
# From this m * Hk on, copying heads apart is cheaper on CPU than the products of heads that do not match.
_CPU_KEYS_WORTH_SPLITTING = 64


@dataclass(frozen=True)
class FlashVariant:
    """How a flash backend computes: the causal kernel, and whether the in-block part is the Triton kernel."""

    causal: CausalKernel
    fused: bool


def flash_variant(backend: str, device: torch.device) -> FlashVariant:
    """What a name of ``FLASH_BACKENDS`` means on a device: ``flash`` is PyTorch's own causal kernel.

    ``flash_eager`` is the same with the in-block part in PyTorch's operators, as always on CPU.
    """
    if device.type == "cpu":
        return FlashVariant(CPU_KERNEL, fused=False)
    return FlashVariant(PACKAGE_KERNELS.get(backend, ATEN_KERNEL), fused=backend != "flash_eager")


def flash_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, backend: str = "flash") -> str | None:
    """Why a flash backend cannot run on such tensors, as a clause; None when it can."""
    if device.type == "cpu":
        if backend not in ("flash", "flash_eager"):
            return f"{backend} runs on CUDA, not on cpu"
        if dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return None
        return f"the CPU flash kernel takes floating point, not {dtype}"
    if device.type != "cuda":
        return f"flash attention runs on CPU and CUDA, not on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"CUDA flash attention takes bfloat16 or float16, not {dtype}"
    max_head_dim = _MAX_CUDA_HEAD_DIM.get(backend, 256)
    if head_dim % 8 or head_dim > max_head_dim:
        return f"CUDA flash attention takes head dims that are multiples of 8 up to {max_head_dim}, not {head_dim}"
    if backend != "flash_eager" and importlib.util.find_spec("triton") is None:
        return "its in-block part needs Triton, which is not installed (pip install triton)"
    if backend in PACKAGE_KERNELS and (obstacle := package_obstacle(backend)) is not None:
        return obstacle
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"CUDA flash attention needs compute capability 8.0, this device has {major}.{minor}"
    if backend == "flash_attn3" and major != 9:
        return f"FlashAttention 3 needs compute capability 9.0 (Hopper), this device has {major}.{minor}"
    if backend == "transformer_engine" and (major >= 12 or (torch.backends.cudnn.version() or 0) < _MIN_CUDNN):
        return (
            "cuDNN gives the log-sum-exp of packed documents unpadded from version 9.6 on and below compute capability "
            f"12.0, here are {torch.backends.cudnn.version()} and {major}.{minor}"
        )
    return None


def flash_block_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout, scale: float, variant: FlashVariant
) -> Tensor:
    """q [B, S, H, D], k/v [B, S, P, D] -> [B, S, H, D]; keeps q, k, v, out and lse, as plain flash does."""
    num_kv_heads = k.shape[2]
    split = not (q.is_cuda or variant.fused) and layout.block_size > 1 and num_kv_heads > 1
    split = split and layout.block_size * num_kv_heads >= _CPU_KEYS_WORTH_SPLITTING
    if split:
        q, k, v = (_split_heads(x, num_kv_heads) for x in (q, k, v))
        layout = layout.repeat_rows(num_kv_heads)
    # Autocast would send the float32 products below back to half precision.
    with torch.autocast(q.device.type, enabled=False):
        out = _FlashBlockCausal.apply(q.contiguous(), k.contiguous(), v.contiguous(), layout, scale, variant)
    return _join_heads(out, num_kv_heads) if split else out


def _split_heads(x: Tensor, num_kv_heads: int) -> Tensor:
    """[B, S, P * heads, D] -> [B * P, S, heads, D]."""
    return x.unflatten(2, (num_kv_heads, -1)).transpose(1, 2).flatten(0, 1)


def _join_heads(x: Tensor, num_kv_heads: int) -> Tensor:
    """Inverse of ``_split_heads``: [B * P, S, heads, D] -> [B, S, P * heads, D]."""
    return x.unflatten(0, (-1, num_kv_heads)).transpose(1, 2).flatten(2, 3)


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout, scale: float, variant: FlashVariant
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The forward pass alone: out [B, S, H, D], its lse [B, S, H], and what the kernel's backward pass asks for.

    Inputs are contiguous. Softmax over further keys may be merged into out and lse before `flash_backward`.
    """
    out, lse, kernel_state = variant.causal.forward(q, k, v, layout, scale)
    if layout.block_size > 1:
        merge = _merge_fused if variant.fused else _merge_eagerly
        out, lse = merge(out, lse, q, k, v, layout.block_size, scale)
    return out, lse, kernel_state


def flash_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kernel_state: Sequence[Tensor],
    layout: BlockCausalLayout,
    scale: float,
    variant: FlashVariant,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `out` and `lse` are those of the softmax over ALL keys, merged or not."""
    grads = variant.causal.backward(grad_out, q, k, v, out, lse, kernel_state, layout, scale)
    if layout.block_size > 1:
        add = _add_grads_fused if variant.fused else _add_grads_eagerly
        add(grads, grad_out, q, k, v, out, lse, layout.block_size, scale)
    return grads


class _FlashBlockCausal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BlockCausalLayout,
        scale: float,
        variant: FlashVariant,
    ) -> Tensor:
        """The merged output, [B, S, H, D]."""
        out, lse, kernel_state = flash_forward(q, k, v, layout, scale, variant)
        ctx.save_for_backward(q, k, v, out, lse, *kernel_state)
        ctx.constants = layout, scale, variant  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, out, lse, *kernel_state = ctx.saved_tensors  # type: ignore[attr-defined]
        constants = ctx.constants  # type: ignore[attr-defined]
        with torch.autocast(q.device.type, enabled=False):
            grads = flash_backward(grad_out.contiguous(), q, k, v, out, lse, kernel_state, *constants)
        return (*grads, None, None, None)


# ------------------------------------------------------------------------------- in-block part, one kernel


def _merge_fused(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Adds the later keys of each block to causal out [B, S, H, D] (in place) and lse [B, S, H]."""
    from megatron_bitlm.method.attention_triton import merge_later_keys

    lse_ht = heads_of(lse)
    merge_later_keys(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), out.flatten(0, 1), lse_ht, block_size, scale)
    return out, lse_ht.t().unflatten(0, lse.shape[:2])


def _add_grads_fused(
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
    """Adds the gradients of the later (query, key) pairs to ``grads`` of q, k and v, in place."""
    from megatron_bitlm.method.attention_triton import add_later_key_grads

    grad_q, grad_k, grad_v = (grad.flatten(0, 1) for grad in grads)
    add_later_key_grads(
        (grad_q, grad_k, grad_v),
        grad_out.flatten(0, 1),
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        out.flatten(0, 1),
        heads_of(lse),
        block_size,
        scale,
    )


# ------------------------------------------------------------------------- in-block part, PyTorch's operators


def _merge_eagerly(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Adds the later keys of each block to causal out [B, S, H, D] (in place) and lse [B, S, H]."""
    num_kv_heads, lse = k.shape[2], lse.contiguous()
    q_block, k_block, v_block, out_block = (_by_block(x, block_size) for x in (q, k, v, out))
    scores = _later_scores(q_block, k_block, num_kv_heads, block_size, scale)
    causal_lse = _slot_heads(lse, num_kv_heads, block_size)
    merged_lse = torch.logaddexp(causal_lse, scores.logsumexp(3))
    probability = (scores - merged_lse.unsqueeze(3)).exp_()
    merged = merged_lse.transpose(2, 3).reshape(lse.shape)
    out.mul_((lse - merged).exp_().unsqueeze(-1))
    out_block.baddbmm_(_spread_heads(probability, out.dtype), v_block)
    return out, merged


def _add_grads_eagerly(
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

    ``out`` and ``lse`` are the merged ones.
    """
    num_kv_heads, lse = k.shape[2], lse.contiguous()
    q_block, k_block, v_block, grad_block = (_by_block(x, block_size) for x in (q, k, v, grad_out))
    scores = _later_scores(q_block, k_block, num_kv_heads, block_size, scale)
    probability = scores.sub_(_slot_heads(lse, num_kv_heads, block_size).unsqueeze(3)).exp_()
    delta = _slot_heads((grad_out.to(lse.dtype) * out).sum(-1), num_kv_heads, block_size).unsqueeze(3)
    grad_probability = _matching_heads(_wide_bmm(grad_block, v_block), num_kv_heads, block_size)
    grad_scores = (grad_probability - delta).mul_(probability).mul_(scale)
    spread_grad_scores = _spread_heads(grad_scores, q.dtype)
    grad_q, grad_k, grad_v = (_by_block(grad, block_size) for grad in grads)
    grad_q.baddbmm_(spread_grad_scores, k_block)
    grad_k.baddbmm_(spread_grad_scores.transpose(1, 2), q_block)
    grad_v.baddbmm_(_spread_heads(probability, q.dtype).transpose(1, 2), grad_block)


def _later_scores(q_block: Tensor, k_block: Tensor, num_kv_heads: int, block_size: int, scale: float) -> Tensor:
    """Scaled scores of each query slot with the later slots of its block, -inf elsewhere: [N, M, G, M, P]."""
    scores = _matching_heads(_wide_bmm(q_block, k_block), num_kv_heads, block_size)
    slot = torch.arange(block_size, device=q_block.device)
    seen_before = torch.zeros(block_size, block_size, dtype=scores.dtype, device=q_block.device)
    seen_before.masked_fill_(slot <= slot[:, None], -torch.inf)
    return torch.add(seen_before[:, None, :, None], scores, alpha=scale)


def _by_block(x: Tensor, block_size: int) -> Tensor:
    """[B, S, heads, D] contiguous -> [N, M * heads, D], a view."""
    return x.view(-1, block_size * x.shape[2], x.shape[3])


def _slot_heads(x: Tensor, num_kv_heads: int, block_size: int) -> Tensor:
    """[B, S, H] contiguous -> [N, M, G, P], a view."""
    return x.view(-1, block_size, num_kv_heads, x.shape[2] // num_kv_heads).transpose(2, 3)


def _matching_heads(products: Tensor, num_kv_heads: int, block_size: int) -> Tensor:
    """[N, M * H, M * P] -> [N, M, G, M, P], the pairs of a query head and its own key head, a view."""
    num_shared = products.shape[1] // (block_size * num_kv_heads)
    by_head = products.view(-1, block_size, num_kv_heads, num_shared, block_size, num_kv_heads)
    return by_head.diagonal(dim1=2, dim2=5)


def _spread_heads(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of ``_matching_heads``, zero between other heads: [N, M, G, M, P] -> [N, M * H, M * P]."""
    num_blocks, block_size, num_shared, _, num_kv_heads = values.shape
    shape = (num_blocks, block_size * num_shared * num_kv_heads, block_size * num_kv_heads)
    spread = torch.zeros(shape, dtype=dtype, device=values.device)
    _matching_heads(spread, num_kv_heads, block_size).copy_(values)
    return spread


def _wide_bmm(a: Tensor, b: Tensor) -> Tensor:
    """a [N, I, D] times b [N, J, D] transposed -> [N, I, J] in float32, or float64 for float64 inputs.

    Scores rounded to half precision would be wrong by their size times 2^-9 inside an exponential.
    """
    b_transposed = b.transpose(1, 2)
    if a.is_cuda and a.dtype != _wide(a.dtype):
        return torch.bmm(a, b_transposed, out_dtype=torch.float32)
    return torch.bmm(a.to(_wide(a.dtype)), b_transposed.to(_wide(a.dtype)))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
