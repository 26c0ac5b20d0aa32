"""Block-causal attention of one rank's share of every row to the keys of the whole row (context parallelism).

Rows are cut into 2R equal chunks of whole blocks; rank r holds chunks r and 2R-1-r, so that all ranks have about the
same work. What a token of a chunk sees falls into two disjoint sets of keys: those of its chunk, which is block-causal
attention within the pieces of documents that lie there, and those of its document that lie before the chunk, of
which the chunk's first piece sees all. The two softmax parts merge by their log-sum-exp as in attention_flash.py.

Legend: B batch, S whole sequence, L = S/R a rank's tokens, C = S/2R a chunk's, N blocks of a rank, H query heads, Hk
key heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_bitlm.method.attention import check_heads, masked_attention, usable_backend
from megatron_bitlm.method.attention_flash import FlashVariant, flash_backward, flash_forward, flash_variant
from megatron_bitlm.method.attention_layout import BlockCausalLayout

_aten = torch.ops.aten


@dataclass(frozen=True)
class EarlierKeys:
    """A piece of a document in a chunk, and where the document lies before that chunk.

    queries: tokens of the rank's share of row `row`; keys: tokens of the whole row, which these queries all see.
    """

    row: int
    queries: slice
    keys: slice


@dataclass(frozen=True)
class SequenceShard:
    """A rank's share of a batch; make it with ``SequenceShard.build``.

    whole: documents of the whole rows; chunks: the rank's tokens of a row; own: the pieces of documents in the rank's
    share, its two chunks one after the other; earlier: what the pieces at the start of a chunk see before it.
    """

    whole: BlockCausalLayout
    chunks: tuple[slice, slice]
    own: BlockCausalLayout = field(repr=False)
    earlier: tuple[EarlierKeys, ...] = field(repr=False)

    @classmethod
    def build(cls, whole: BlockCausalLayout, rank: int, num_ranks: int) -> SequenceShard:
        """The share of rank ``rank`` of ``num_ranks``.

        Raises:
            ValueError: rows that do not divide into 2 ``num_ranks`` chunks of whole blocks, or no such rank.
        """
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank {rank} of {num_ranks} does not exist")
        length = whole.seq_len // (2 * num_ranks)
        if whole.seq_len % (2 * num_ranks * whole.block_size):
            raise ValueError(
                f"{whole.seq_len} tokens a row are not {2 * num_ranks} equal chunks of whole blocks of "
                f"{whole.block_size}, two a rank"
            )
        starts = (rank * length, (2 * num_ranks - 1 - rank) * length)
        offsets, earlier = [0], []
        for row in range(whole.batch_size):
            row_start = row * whole.seq_len
            for index, start in enumerate(starts):
                pieces = _documents_between(whole.cu_seqlens, row_start + start, row_start + start + length)
                local_start = index * length
                for document_start, begin, end in pieces:
                    queries = slice(begin - row_start - start + local_start, end - row_start - start + local_start)
                    offsets.append(row * 2 * length + queries.stop)
                    if document_start < begin:
                        earlier.append(EarlierKeys(row, queries, slice(document_start - row_start, start)))
        own = BlockCausalLayout.build(whole.batch_size, 2 * length, whole.block_size, offsets)
        chunks = (slice(starts[0], starts[0] + length), slice(starts[1], starts[1] + length))
        return cls(whole, chunks, own, tuple(earlier))

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """The rank's share of the tokens along ``dim`` (S -> L)."""
        first, second = (x.narrow(dim, chunk.start, chunk.stop - chunk.start) for chunk in self.chunks)
        return torch.cat([first, second], dim)

    def tokens_on(self, device: torch.device) -> Tensor:
        """Numbers of the rank's tokens in a row: int64 [L]."""
        return self.own.keep("tokens", device, lambda: self.take(torch.arange(self.whole.seq_len), 0).to(device))

    def blocks_on(self, device: torch.device) -> Tensor:
        """Numbers of the rank's blocks in a row: int64 [N]."""
        size = self.whole.block_size
        return self.own.keep("blocks", device, lambda: self.tokens_on(device)[::size] // size)


def shard_block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shard: SequenceShard,
    backend: str = "auto",
    scale: float | None = None,
) -> Tensor:
    """``block_causal_attention`` of the whole rows, at the tokens of one rank's share (eq. 16).

    Args:
        q: queries of the share, [B, L, H, d].
        k: keys of the whole rows, in order, [B, S, Hk, d].
        v: values of the whole rows, [B, S, Hk, d].
        shard: documents and the share.
        backend: as for ``block_causal_attention``, but not ``flex``. The keys before a chunk always go through
            PyTorch's own flash kernel.
        scale: factor of the scores; None is 1/sqrt(d).

    Returns:
        [B, L, H, d], dtype of q.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a backend that cannot run.
    """
    check_heads(q, k, v)
    found, wanted = (q.shape[:2], k.shape[:2]), (_shape(shard.own), _shape(shard.whole))
    if found != wanted:
        raise ValueError(f"the share is for queries and keys of {wanted}, the call has {found}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = usable_backend(backend, q, shard.own)
    if backend == "dense":
        mask = shard.own.keep("shard_mask", q.device, lambda: shard_mask(shard, q.device))
        return masked_attention(q, k, v, mask, scale)
    if backend == "flex":
        raise ValueError(
            "attention backend 'flex' cannot attend from a share of a row; use auto, dense or a flash backend"
        )
    with torch.autocast(q.device.type, enabled=False):
        return _FlashShard.apply(q.contiguous(), k, v, shard, scale, flash_variant(backend, q.device))


def shard_mask(shard: SequenceShard, device: torch.device) -> Tensor:
    """The rows of eq. 16's mask that belong to the share: bool [B, 1, L, S], True where a query sees a key."""
    documents, tokens = shard.whole.document_ids_on(device), shard.tokens_on(device)
    block_s = torch.arange(shard.whole.seq_len, device=device) // shard.whole.block_size
    same_document = documents[:, tokens, None] == documents[:, None, :]
    return (same_document & (block_s <= block_s[tokens][:, None])).unsqueeze(1)


def _shape(layout: BlockCausalLayout) -> tuple[int, int]:
    return layout.batch_size, layout.seq_len


def _documents_between(cu_seqlens: Sequence[int], start: int, end: int) -> list[tuple[int, int, int]]:
    """(start of the document, begin and end of its part in [start, end)) of every document with a part there."""
    spans = zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)
    return [(first, max(first, start), min(last, end)) for first, last in spans if first < end and last > start]


class _FlashShard(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard, scale: float, variant: FlashVariant
    ) -> Tensor:
        """The merged output, [B, L, H, d]."""
        own_k, own_v = shard.take(k).contiguous(), shard.take(v).contiguous()
        out, lse, kernel_state = flash_forward(q, own_k, own_v, shard.own, scale, variant)
        for piece in shard.earlier:
            queries, keys = (piece.row, piece.queries), (piece.row, piece.keys)
            part, part_lse = _full_forward(q[queries], k[keys], v[keys], scale)
            merged = torch.logaddexp(lse[queries], part_lse)
            kept, added = (lse[queries] - merged).exp_(), (part_lse - merged).exp_()
            out[queries] = (out[queries] * kept.unsqueeze(-1) + part * added.unsqueeze(-1)).to(out.dtype)
            lse[queries] = merged
        ctx.save_for_backward(q, k, v, out, lse, *kernel_state)
        ctx.shard, ctx.scale, ctx.variant = shard, scale, variant  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, and of the keys and values of the whole rows as far as this share saw them."""
        q, k, v, out, lse, *kernel_state = ctx.saved_tensors  # type: ignore[attr-defined]
        shard, scale, variant = ctx.shard, ctx.scale, ctx.variant  # type: ignore[attr-defined]
        grad_out = grad_out.contiguous()
        grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        with torch.autocast(q.device.type, enabled=False):
            own_k, own_v = shard.take(k).contiguous(), shard.take(v).contiguous()
            grads = flash_backward(grad_out, q, own_k, own_v, out, lse, kernel_state, shard.own, scale, variant)
            grad_q = grads[0]
            for whole, own in ((grad_k, grads[1]), (grad_v, grads[2])):
                for chunk, part in zip(shard.chunks, own.chunk(2, 1), strict=True):
                    whole[:, chunk] = part
            for piece in shard.earlier:
                queries, keys = (piece.row, piece.queries), (piece.row, piece.keys)
                part_q, part_k, part_v = _full_backward(
                    grad_out[queries], q[queries], k[keys], v[keys], out[queries], lse[queries], scale
                )
                grad_q[queries] += part_q
                grad_k[keys] += part_k
                grad_v[keys] += part_v
        return grad_q, grad_k, grad_v, None, None, None


# Attention of [tokens, H, d] to all keys [tokens, Hk, d]; lse [tokens, H].


def _full_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if q.is_cuda:
        out, lse, *_ = _aten._flash_attention_forward(
            q[None], k[None], v[None], None, None, q.shape[0], k.shape[0], 0.0, False, False, scale=scale
        )
        return out[0], lse[0].t()
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, 0.0, False, scale=scale)
    return out[0].transpose(0, 1), lse[0].t()


def _full_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> list[Tensor]:
    if q.is_cuda:
        batched = (x[None] for x in (grad_out, q, k, v, out))
        lse_bhs = lse.t().contiguous()[None]
        # The generator's state: asked for, and not read without dropout.
        state = (q.new_zeros(2, dtype=torch.uint64), q.new_empty(0))
        grads = _aten._flash_attention_backward(
            *batched, lse_bhs, None, None, q.shape[0], k.shape[0], 0.0, False, *state, scale=scale
        )
        return [grad[0] for grad in grads]
    heads_first = (x.transpose(0, 1)[None] for x in (grad_out, q, k, v, out, lse))
    grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads_first, 0.0, False, scale=scale)
    return [grad[0].transpose(0, 1) for grad in grads]
