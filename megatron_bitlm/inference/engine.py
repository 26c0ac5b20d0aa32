"""Continuous batches: requests come and go while the others are decoded, one block of each at a time.

The rows of the batch are rows of a preallocated KV cache. A step admits what waits, realises the next block of every
row, and reads it with the backbone, whose pass also stores its keys and values. Rows of unequal length, sampler and
seed share the passes; none sees another. Which kind of model decodes is the decoder's affair.

Shape legend: B rows of the batch, M tokens of a block (1 in a softmax model), D backbone width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.inference.prompts import Generation, Request
from megatron_bitlm.model.layout import KVCache, SequenceLayout

# (rows, time, their states [B, M, K]) at t = 1 and after every denoising step
Observer = Callable[[list["Row"], float, Tensor], None]


@dataclass(eq=False)
class Row:
    """A request being decoded.

    ids: tokens that the backbone has read, framing included; known: those of the prompt's last, partial block, until it
    is realised; result: so far.
    """

    request: Request
    ids: list[int]
    known: list[int]
    result: Generation = field(default_factory=Generation)

    @property
    def is_done(self) -> bool:
        """EOS was generated, or the limit is reached."""
        return self.result.finished or len(self.result.ids) >= self.request.max_new_tokens

    def take(self, tokens: list[int], eos_id: int) -> list[int]:
        """Keep what is new and wanted of a realised block: up to EOS, or the limit. Returns it."""
        start = len(self.result.ids)
        for token in tokens[len(self.known) :]:
            if len(self.result.ids) >= self.request.max_new_tokens:
                break
            if token == eos_id:
                self.result.finished = True
                break
            self.result.ids.append(token)
        return self.result.ids[start:]


class Decoder(Protocol):
    """One kind of model: how prompts are framed, read, and continued by a block."""

    block_size: int
    vocab_size: int
    eos_id: int
    device: torch.device

    def check(self, request: Request) -> None:
        """Raise BitLMError where the request's sampler does not fit."""

    def frame(self, prompt: Sequence[int]) -> list[int]:
        """The prompt with what precedes it in training."""

    def states(self, ids: Tensor, layout: SequenceLayout) -> Tensor:
        """Final states [S, B, D] of ids [B, S]."""

    def realise(self, condition: Tensor, rows: list[Row], observe: Observer | None) -> list[list[int]]:
        """The next block of every row, given the states [B, M, D] of the one before it."""


@dataclass
class Progress:
    """What a step did for a request: its new ids, and its result once it has ended."""

    request: Request
    ids: list[int]
    result: Generation | None = None


class Engine:
    """Decodes requests in a continuous batch.

    Args:
        decoder: The model.
        max_batch_size: Rows decoded at a time; further requests wait.
        max_length: Tokens of a row, framing and the last block included; the cache holds max_batch_size of these.
        max_prompt_tokens: Prompts admitted in one pass hold at most so many tokens together (or are one).
        cached: False reads everything again for every block: a reference, for tests.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_batch_size: int,
        max_length: int,
        max_prompt_tokens: int = 16384,
        cached: bool = True,
    ) -> None:
        for name, value in (("max_batch_size", max_batch_size), ("max_length", max_length)):
            if value < 1:
                raise BitLMError(f"{name} must be at least 1, got {value}")
        self.decoder, self.max_prompt_tokens, self.cached = decoder, max_prompt_tokens, cached
        self.cache = KVCache(max_batch_size, max_length)
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []  # row i of the batch is row i of the cache
        self.condition = torch.empty(0)  # [B, M, D], of the newest block of every row

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.rows or self.waiting)

    def length_of(self, request: Request) -> int:
        """Tokens of the cache that a request takes at most: prompt and new tokens in whole blocks, and framing."""
        size = self.decoder.block_size
        whole = len(self.decoder.frame(request.prompt)) + request.max_new_tokens
        return -(-whole // size) * size

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            BitLMError: Ids, seed, limit or sampler out of range, or more tokens than a row holds.
        """
        request.check(self.decoder.vocab_size)
        self.decoder.check(request)
        length = self.length_of(request)
        if length > self.cache.max_length:
            raise BitLMError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones take {length} with "
                f"their framing, more than the {self.cache.max_length} of the context; shorten the prompt or lower "
                "max_new_tokens"
            )
        framed = self.decoder.frame(request.prompt)
        num_full = len(framed) // self.decoder.block_size * self.decoder.block_size
        self.waiting.append(Row(request, framed[:num_full], framed[num_full:]))

    def cancel(self, request: Request) -> None:
        """Forget a request, whether it waits or is being decoded; one that has ended is no error."""
        self.waiting = deque(row for row in self.waiting if row.request is not request)
        for index, row in enumerate(self.rows):
            if row.request is request:
                self._remove([index])
                return

    @torch.no_grad()
    def step(self, observe: Observer | None = None) -> list[Progress]:
        """Realise one block of every row.

        Args:
            observe: Shown the states of the blocks while they are denoised (by a BitLM).

        Returns:
            One entry a request in the batch, in the batch's order.
        """
        self._admit()
        if not self.rows:
            return []
        blocks = self.decoder.realise(self.condition, self.rows, observe)
        done, progress = [], []
        for index, (row, block) in enumerate(zip(self.rows, blocks, strict=True)):
            new = row.take(block, self.decoder.eos_id)
            row.ids, row.known = row.ids + block, []
            if row.is_done:
                done.append(index)
            progress.append(Progress(row.request, new, row.result if row.is_done else None))
        self._remove(done)
        self._read_newest()
        return progress

    def run(self, requests: Sequence[Request], observe: Observer | None = None) -> list[Generation]:
        """Decode these requests to their ends, with whatever else is queued; results in their order."""
        for request in requests:
            self.add(request)
        results: dict[int, Generation] = {}
        while self.has_work:
            results |= {id(p.request): p.result for p in self.step(observe) if p.result is not None}
        return [results[id(request)] for request in requests]

    def _admit(self) -> None:
        """Read waiting prompts into free rows, together in one pass."""
        admitted: list[Row] = []
        num_tokens = 0
        while self.waiting and len(self.rows) + len(admitted) < self.cache.num_rows:
            if admitted and num_tokens + len(self.waiting[0].ids) > self.max_prompt_tokens:
                break
            admitted.append(self.waiting.popleft())
            num_tokens += len(admitted[-1].ids)
        if admitted:
            places = list(range(len(self.rows), len(self.rows) + len(admitted)))
            states = self._read_whole(admitted, places)
            self.condition = torch.cat([self.condition, states]) if self.rows else states
            self.rows += admitted

    def _read_whole(self, rows: list[Row], places: list[int]) -> Tensor:
        """Read all tokens of rows into empty places of the cache; C of their last blocks [B, M, D]."""
        lengths = [len(row.ids) for row in rows]
        size, device = self.decoder.block_size, self.decoder.device
        layout = SequenceLayout.prompts(self.cache, places, lengths, size, device=device)
        ids = torch.tensor([[token for row in rows for token in row.ids]], device=device)
        ends = torch.tensor(lengths, device=device).cumsum(0)
        last = ends[:, None] + torch.arange(-size, 0, device=device)
        return self.decoder.states(ids, layout)[last, 0]

    def _read_newest(self) -> None:
        """Read the block that was realised last in every row; this pass also stores its keys and values."""
        if not self.rows:
            return
        if not self.cached:
            for index in range(len(self.rows)):
                self.cache.release(index)
            self.condition = self._read_whole(self.rows, list(range(len(self.rows))))
            return
        size, device = self.decoder.block_size, self.decoder.device
        layout = SequenceLayout.next_blocks(self.cache, len(self.rows), size, device=device)
        ids = torch.tensor([row.ids[-size:] for row in self.rows], device=device)
        self.condition = self.decoder.states(ids, layout).transpose(0, 1)

    def _remove(self, indices: list[int]) -> None:
        """Take rows out of the batch; the last rows fill the gaps, so that the batch stays the cache's first rows."""
        order = list(range(len(self.rows)))
        for index in sorted(indices, reverse=True):
            last = len(order) - 1
            if index == last:
                self.cache.release(index)
            else:
                self.cache.move(last, index)
                order[index] = order[last]
            order.pop()
        if indices:
            self.rows = [self.rows[index] for index in order]
            self.condition = self.condition[torch.tensor(order, dtype=torch.int64, device=self.condition.device)]
