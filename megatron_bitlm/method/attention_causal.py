"""Causal flash attention of packed documents that gives its log-sum-exp and takes a foreign one back.

The backward pass of flash attention needs nothing but the output and the log-sum-exp of the softmax. Handed those of a
softmax over more keys (attention_flash.py), it gives the causal keys' share of the gradients. PyTorch's own kernels
stand here, both through ``aten``: one for CPU, and FlashAttention 2 for CUDA. Those of other packages stand in
attention_packages.py.

Legend: B batch, S sequence, T = B*S tokens, H query heads, P key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bitlm.method.attention_layout import BlockCausalLayout, DocumentGroup

_aten = torch.ops.aten

_Forward = Callable[[Tensor, Tensor, Tensor, BlockCausalLayout, float], tuple[Tensor, Tensor, tuple[Tensor, ...]]]
_Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Sequence[Tensor], BlockCausalLayout, float],
    tuple[Tensor, Tensor, Tensor],
]


@dataclass(frozen=True)
class CausalKernel:
    """One implementation.

    forward: contiguous q [B, S, H, D], k and v [B, S, P, D], layout and scale -> out [B, S, H, D] (contiguous), lse
    [B, S, H] (float32, or float64 for such inputs; the natural log of the sum of exponentiated scaled scores) and what
    its backward asks for.
    backward: contiguous grad_out, q, k, v, out, then lse, forward's last result, layout and scale -> the gradients
    of q, k and v, contiguous.
    """

    forward: _Forward
    backward: _Backward


# ------------------------------------------------------------------------------------------- PyTorch, CPU


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    if layout.is_uniform:
        out, lse = _cpu_group_forward(q, k, v, layout.groups[0], scale)
        return out.view(q.shape), lse.view(q.shape[:-1]), ()
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for group in layout.groups:
        group_out, group_lse = _cpu_group_forward(q, k, v, group, scale)
        _put_by_document(out, group, group_out)
        _put_by_document(lse, group, group_lse)
    return out, lse, ()


def _cpu_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Sequence[Tensor],
    layout: BlockCausalLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if layout.is_uniform:
        found = _cpu_group_backward(grad_out, q, k, v, out, lse, layout.groups[0], scale)
        return found[0].view(q.shape), found[1].view(k.shape), found[2].view(v.shape)
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    for group in layout.groups:
        found = _cpu_group_backward(grad_out, q, k, v, out, lse, group, scale)
        for grad, group_grad in zip(grads, found, strict=True):
            _put_by_document(grad, group, group_grad)
    return grads


def _cpu_group_forward(q: Tensor, k: Tensor, v: Tensor, group: DocumentGroup, scale: float) -> tuple[Tensor, Tensor]:
    """out [documents, length, H, D] and lse [documents, length, H] of one group of documents."""
    heads_first = (_by_document(x, group).transpose(1, 2) for x in (q, k, v))
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, 0.0, True, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def _cpu_group_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    group: DocumentGroup,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k and v, each [documents, length, heads, D], of one group of documents."""
    heads_first = (_by_document(x, group).transpose(1, 2) for x in (grad_out, q, k, v, out, lse))
    grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads_first, 0.0, True, scale=scale)
    return [grad.transpose(1, 2).contiguous() for grad in grads]


def _by_document(x: Tensor, group: DocumentGroup) -> Tensor:
    """[B, S, ...] -> [documents of the group, length, ...]; a view where the documents are neighbours."""
    tokens = x.flatten(0, 1)
    found = tokens[group.rows] if isinstance(group.rows, slice) else tokens.index_select(0, group.rows)
    return found.unflatten(0, (group.num_documents, group.length))


def _put_by_document(target: Tensor, group: DocumentGroup, values: Tensor) -> None:
    """Writes [documents, length, ...] to their place in ``target`` [B, S, ...], which must be contiguous."""
    tokens = target.flatten(0, 1)
    if isinstance(group.rows, slice):
        tokens[group.rows] = values.flatten(0, 1)
    else:
        tokens.index_copy_(0, group.rows, values.flatten(0, 1))


# ------------------------------------------------------------------------------------------ PyTorch, CUDA


def _aten_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    offsets, longest = layout.offsets_on(q.device), layout.max_seqlen
    tokens = (x.flatten(0, 1) for x in (q, k, v))
    # Without dropout the two tensors behind the lse mean nothing, but backward asks for them.
    out, lse, rng_state, unused, _ = _aten._flash_attention_forward(
        *tokens, offsets, offsets, longest, longest, 0.0, True, False, scale=scale
    )
    return out.contiguous().view(q.shape), rows_of(lse, q), (rng_state, unused)


def _aten_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Sequence[Tensor],
    layout: BlockCausalLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    offsets, longest = layout.offsets_on(q.device), layout.max_seqlen
    tokens = (x.flatten(0, 1) for x in (grad_out, q, k, v, out))
    grads = _aten._flash_attention_backward(
        *tokens, heads_of(lse), offsets, offsets, longest, longest, 0.0, True, *state, scale=scale
    )
    return shaped_like(grads, (q, k, v))


def heads_of(lse: Tensor) -> Tensor:
    """lse [B, S, H] as the CUDA kernels keep it, contiguous [H, T]; a view of what one of them gave."""
    return lse.flatten(0, 1).t().contiguous()


def rows_of(lse: Tensor, q: Tensor) -> Tensor:
    """A kernel's lse [H, T] as [B, S, H], a view."""
    num_tokens = q.shape[0] * q.shape[1]
    if lse.shape != (q.shape[2], num_tokens):
        raise ValueError(
            f"the causal kernel gave a log-sum-exp of shape {tuple(lse.shape)} for {num_tokens} tokens and "
            f"{q.shape[2]} heads; its version is not one this package knows, use the attention backend flash"
        )
    return lse.t().unflatten(0, q.shape[:2])


def shaped_like(grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of flattened q, k and v in the shapes of the inputs."""
    grad_q, grad_k, grad_v = (grad.contiguous().view(x.shape) for grad, x in zip(grads, inputs, strict=True))
    return grad_q, grad_k, grad_v


CPU_KERNEL = CausalKernel(_cpu_forward, _cpu_backward)
ATEN_KERNEL = CausalKernel(_aten_forward, _aten_backward)
