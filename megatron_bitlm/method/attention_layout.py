"""Where the documents of a packed batch lie: checked once per batch, shared by every layer.

Offsets count tokens of the flattened batch, row after row: document i is tokens [cu_seqlens[i],
cu_seqlens[i+1]). Every row of the batch starts a document and every document is a whole number of blocks.

Legend: B batch, S sequence, T = B*S tokens, G documents of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_T = TypeVar("_T")


@dataclass(frozen=True)
class DocumentGroup:
    """All documents of one length, so that they can go through a kernel as one batch.

    ``rows`` selects their tokens from the flattened batch: a slice when they are neighbours (no copy needed),
    int64 [G * length] otherwise.
    """

    num_documents: int
    length: int
    rows: slice | Tensor


@dataclass(frozen=True)
class BlockCausalLayout:
    """Documents and blocks of one batch; make it with ``BlockCausalLayout.build``.

    Tensors and masks that follow from it are made on first use and kept here, so one object serves all layers
    of a step.
    """

    batch_size: int
    seq_len: int
    block_size: int
    cu_seqlens: tuple[int, ...]
    max_seqlen: int
    groups: tuple[DocumentGroup, ...] = field(repr=False)
    _kept: dict[tuple[str, torch.device], object] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        batch_size: int,
        seq_len: int,
        block_size: int,
        cu_seqlens: Tensor | Sequence[int] | np.ndarray | None = None,
    ) -> BlockCausalLayout:
        """Checks the offsets and groups the documents by length.

        Args:
            batch_size: B rows.
            seq_len: S tokens a row.
            block_size: m tokens a block.
            cu_seqlens: int [num_documents + 1], 0 ... B*S; None makes every row one document. A CUDA tensor
                costs one device-to-host copy.

        Raises:
            ValueError: block_size < 1; S is not a whole number of blocks; offsets do not start at 0, do not
                end at B*S, do not increase, are not multiples of block_size, or miss a row's start.
        """
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if batch_size < 1 or seq_len < 1:
            raise ValueError(f"attention needs at least one token, got a {batch_size} x {seq_len} batch")
        if seq_len % block_size:
            raise ValueError(f"{seq_len} tokens a row are not a whole number of blocks of {block_size}")
        if cu_seqlens is None:
            offsets = np.arange(batch_size + 1, dtype=np.int64) * seq_len
        else:
            offsets = _checked_offsets(cu_seqlens, batch_size, seq_len, block_size)
        lengths = np.diff(offsets)
        return cls(
            batch_size=batch_size,
            seq_len=seq_len,
            block_size=block_size,
            cu_seqlens=tuple(offsets.tolist()),
            max_seqlen=int(lengths.max()),
            groups=_group_by_length(offsets, lengths),
        )

    @property
    def is_uniform(self) -> bool:
        """Whether all documents have one length, so the batch is already a batch of documents."""
        return len(self.groups) == 1

    def repeat_rows(self, times: int) -> BlockCausalLayout:
        """The layout of the batch with every row ``times`` times in succession; kept after first use."""

        def make() -> BlockCausalLayout:
            starts, copies = np.asarray(self.cu_seqlens[:-1]), np.arange(times)
            row, within = np.divmod(starts, self.seq_len)
            repeated = (row[:, None] * times + copies) * self.seq_len + within[:, None]
            end = self.batch_size * times * self.seq_len
            offsets = np.append(np.sort(repeated, axis=None), end)
            return self.build(self.batch_size * times, self.seq_len, self.block_size, offsets)

        return self.keep(f"{times} times", torch.device("cpu"), make)

    def keep(self, name: str, device: torch.device, make: Callable[[], _T]) -> _T:
        """``make()`` the first time, the same object afterwards (one per name and device)."""
        if (name, device) not in self._kept:
            self._kept[name, device] = make()
        return self._kept[name, device]  # type: ignore[return-value]

    def offsets_on(self, device: torch.device) -> Tensor:
        """``cu_seqlens`` as int32 [num_documents + 1] on ``device``."""
        return self.keep("offsets", device, lambda: torch.tensor(self.cu_seqlens, dtype=torch.int32, device=device))

    def document_ids_on(self, device: torch.device) -> Tensor:
        """Number of the document each token belongs to, int32 [B, S] on ``device``."""

        def make() -> Tensor:
            lengths = torch.tensor(np.diff(self.cu_seqlens))
            numbers = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)
            return numbers.view(self.batch_size, self.seq_len).to(device)

        return self.keep("document_ids", device, make)


def _checked_offsets(
    cu_seqlens: Tensor | Sequence[int] | np.ndarray, batch_size: int, seq_len: int, block_size: int
) -> np.ndarray:
    values = cu_seqlens.detach().cpu().numpy() if isinstance(cu_seqlens, Tensor) else np.asarray(cu_seqlens)
    if values.ndim != 1 or values.size < 2 or values.dtype.kind not in "iu":
        found = f"{values.dtype} of shape {values.shape}"
        raise ValueError(f"cu_seqlens must be at least two integers in one axis, got {found}")
    offsets = values.astype(np.int64)
    num_tokens = batch_size * seq_len
    if offsets[0] != 0 or offsets[-1] != num_tokens:
        found = f"{offsets[0]} ... {offsets[-1]}"
        raise ValueError(f"cu_seqlens must run from 0 to the batch's {num_tokens} tokens, got {found}")
    backward_steps = np.flatnonzero(np.diff(offsets) <= 0)
    if backward_steps.size:
        first, second = offsets[backward_steps[0] : backward_steps[0] + 2]
        raise ValueError(f"cu_seqlens must increase, got {first} followed by {second}")
    ragged = offsets[offsets % block_size != 0]
    if ragged.size:
        raise ValueError(f"cu_seqlens must be multiples of the block size {block_size}, got {ragged[0]}")
    missing = np.setdiff1d(np.arange(batch_size) * seq_len, offsets)
    if missing.size:
        raise ValueError(f"cu_seqlens must hold the start of every row, token {missing[0]} is missing")
    return offsets


def _group_by_length(offsets: np.ndarray, lengths: np.ndarray) -> tuple[DocumentGroup, ...]:
    groups = []
    for length in np.unique(lengths).tolist():
        starts = offsets[:-1][lengths == length]
        num_documents, span = len(starts), int(starts[-1] - starts[0]) + length
        rows: slice | Tensor
        if span == num_documents * length:
            rows = slice(int(starts[0]), int(starts[0]) + span)
        else:
            rows = torch.from_numpy((starts[:, None] + np.arange(length)).reshape(-1))
        groups.append(DocumentGroup(num_documents, length, rows))
    return tuple(groups)
