"""Block-wise generation with a KV cache (BitLM algorithm 2).

Prompts are framed as in training (M BOS tokens first) and padded on the left by whole blocks, so that all rows of a
batch end together; padding is invisible to attention and positions. The known tokens of a prompt's last, partial
block are held to their codes while the open slots are denoised.
Shape legend: B rows, M slots, K bits, D backbone width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.noise import Stream, normal
from megatron_bitlm.method.path import TabulatedTime
from megatron_bitlm.method.sampler import BlockSampler, KnownSlots, SamplerConfig
from megatron_bitlm.model.bitlm import BitLM
from megatron_bitlm.model.layout import KVCache, SequenceLayout

# (number of the generated block, time, state [B, M, K]) at t = 1 and after every denoising step
Observer = Callable[[int, float, Tensor], None]


@dataclass
class Generation:
    """What one prompt became.

    ids: new token ids, without the EOS; finished: EOS was generated; num_blocks: blocks denoised; num_invalid: slots
    whose final sign pattern belonged to no id and was moved to the nearest.
    """

    ids: list[int] = field(default_factory=list)
    finished: bool = False
    num_blocks: int = 0
    num_invalid: int = 0


class Generator:
    """Generates with one model and fixed sampler settings.

    Args:
        model: BitLM on one pipeline stage, in eval mode.
        code: Token code.
        bos_id, eos_id: Framing ids.
        sampler: Steps, guidance, grid.
        profile: Measured entropy rate for the entropy grid, or None.
        cached: Keep keys and values between blocks; False runs the whole prefix again for every block.

    Raises:
        BitLMError: A sampler setting outside its range.
    """

    def __init__(
        self,
        model: BitLM,
        code: BinaryCode,
        *,
        bos_id: int,
        eos_id: int,
        sampler: SamplerConfig | None = None,
        profile: TabulatedTime | None = None,
        cached: bool = True,
    ) -> None:
        self.model, self.code, self.bos_id, self.eos_id, self.cached = model, code, bos_id, eos_id, cached
        try:
            self.sampler = BlockSampler(model.head, sampler or SamplerConfig(), profile)
        except ValueError as error:
            raise BitLMError(f"sampler: {error}") from error
        self.block_size = model.block_size
        self.device = model.head.input.weight.device

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        seeds: Sequence[int] | None = None,
        observe: Observer | None = None,
    ) -> list[Generation]:
        """Continue every prompt until EOS or `max_new_tokens`.

        Args:
            prompts: Token ids without framing, one list a row; empty is allowed.
            max_new_tokens: New tokens a row.
            seeds: One seed a row (its result does not depend on the other rows); 0, 1, ... by default.
            observe: Shown the states of every block while it is denoised.

        Raises:
            BitLMError: No prompts, ids outside the vocabulary, or settings out of range.
        """
        prompts = [list(prompt) for prompt in prompts]
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        self._check(prompts, max_new_tokens, seeds)
        rows = _Rows(prompts, self.block_size, self.bos_id, self.device)
        num_open = max_new_tokens + max(rows.num_known)
        num_new_blocks = -(-num_open // self.block_size)
        results = [Generation() for _ in prompts]
        backbone = _CachedBackbone(self.model, self.code, rows, num_new_blocks, self.cached)
        condition = backbone.prefill()
        key = torch.tensor(seeds, dtype=torch.int64, device=self.device)
        for number in range(num_new_blocks):
            final = self._sample_block(number, condition, key, rows, observe)
            ids = self.code.decode(final)
            num_invalid = (~self.code.is_valid(final)).sum(-1)
            self._collect(ids, num_invalid, rows, number, results, max_new_tokens)
            if all(r.finished or len(r.ids) >= max_new_tokens for r in results):
                break
            condition = backbone.commit(ids)
        return results

    def _sample_block(
        self,
        number: int,
        condition: Tensor,
        key: Tensor,
        rows: _Rows,
        observe: Observer | None,
    ) -> Tensor:
        """Final analog bits [B, M, K] of the next block of every row."""
        size = self.block_size * self.code.num_bits
        steps = self.sampler.config.num_steps if self.sampler.config.noise_raise > 0 else 0
        # Blocks are numbered from each row's own start, so padding does not change its noise.
        block = torch.tensor(rows.num_full, device=self.device) + number
        draws = normal(0, Stream.SAMPLER, key, block, (1 + steps) * size)
        draws = draws.unflatten(-1, (1 + steps, self.block_size, self.code.num_bits))
        known = rows.known(self.code) if number == 0 else None
        return self.sampler.sample(
            condition,
            draws[:, 0],
            known=known,
            fresh_noise=(lambda step: draws[:, 1 + step]) if steps else None,
            observe=None if observe is None else (lambda time, state: observe(number, time, state)),
        )

    def _collect(
        self,
        ids: Tensor,
        num_invalid: Tensor,
        rows: _Rows,
        number: int,
        results: list[Generation],
        max_new_tokens: int,
    ) -> None:
        """Append each open row's new tokens, up to its EOS (truncated after it) or its limit."""
        for row, (result, tokens, count) in enumerate(zip(results, ids.tolist(), num_invalid.tolist(), strict=True)):
            if result.finished or len(result.ids) >= max_new_tokens:
                continue
            result.num_blocks += 1
            result.num_invalid += count
            for token in tokens[rows.num_known[row] :] if number == 0 else tokens:
                if len(result.ids) >= max_new_tokens:
                    break
                if token == self.eos_id:
                    result.finished = True
                    break
                result.ids.append(token)

    def _check(self, prompts: list[list[int]], max_new_tokens: int, seeds: list[int]) -> None:
        if not prompts:
            raise BitLMError("no prompts to continue")
        if max_new_tokens < 1:
            raise BitLMError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if len(seeds) != len(prompts):
            raise BitLMError(f"{len(seeds)} seeds for {len(prompts)} prompts")
        if any(not 0 <= seed < 2**63 for seed in seeds):
            raise BitLMError(f"seeds must lie in [0, 2^63), got {seeds}")
        for prompt in prompts:
            for token in prompt:
                if not 0 <= token < self.code.vocab_size:
                    raise BitLMError(f"prompt id {token} is outside the vocabulary of {self.code.vocab_size}")


class _Rows:
    """Framed prompts: whole blocks padded on the left, and the partial last block of each."""

    def __init__(self, prompts: list[list[int]], block_size: int, bos_id: int, device: torch.device) -> None:
        framed = [[bos_id] * block_size + prompt for prompt in prompts]
        self.num_full = [len(ids) // block_size for ids in framed]
        self.num_known = [len(ids) % block_size for ids in framed]
        self.block_size, self.device = block_size, device
        widest = max(self.num_full)
        # Padding may be any id: nothing sees it.
        self.full = torch.tensor(
            [
                [bos_id] * ((widest - full) * block_size) + ids[: full * block_size]
                for ids, full in zip(framed, self.num_full, strict=True)
            ],
            device=device,
        )
        self.key_start = torch.tensor([(widest - full) * block_size for full in self.num_full], device=device)
        partial = torch.full((len(framed), block_size), bos_id, device=device)
        for row, (ids, full, count) in enumerate(zip(framed, self.num_full, self.num_known, strict=True)):
            if count:
                partial[row, :count] = torch.tensor(ids[full * block_size :], device=device)
        self.partial = partial

    def known(self, code: BinaryCode) -> KnownSlots | None:
        """Slots of the first generated block that the prompts fix, or None."""
        if not any(self.num_known):
            return None
        slots = torch.arange(self.block_size, device=self.device)
        mask = slots[None, :] < torch.tensor(self.num_known, device=self.device)[:, None]
        return KnownSlots(code.encode(self.partial), mask)


class _CachedBackbone:
    """Final states of the newest block, from the cache or from the whole prefix."""

    def __init__(self, model: BitLM, code: BinaryCode, rows: _Rows, num_new_blocks: int, cached: bool) -> None:
        self.model, self.code, self.rows, self.cached = model, code, rows, cached
        self.ids = rows.full
        self.capacity = rows.full.shape[1] + num_new_blocks * rows.block_size
        self.cache = self._new_cache()

    def _new_cache(self) -> KVCache:
        key_start = self.rows.key_start if bool((self.rows.key_start > 0).any()) else None
        return KVCache(self.ids.shape[0], self.capacity, key_start)

    def prefill(self) -> Tensor:
        """Read the prompts; C of the last block, [B, M, D]."""
        return self._whole()

    def commit(self, ids: Tensor) -> Tensor:
        """Append realised ids [B, M] and return their C; this pass also stores their keys and values."""
        self.ids = torch.cat([self.ids, ids], dim=1)
        if not self.cached:
            self.cache = self._new_cache()
            return self._whole()
        layout = SequenceLayout.next_block(self.cache, self.rows.block_size, device=ids.device)
        return self._states(ids, layout)

    def _whole(self) -> Tensor:
        layout = SequenceLayout.prompt(self.cache, self.ids.shape[1], self.rows.block_size, device=self.ids.device)
        return self._states(self.ids, layout)

    def _states(self, ids: Tensor, layout: SequenceLayout) -> Tensor:
        hidden = self.model.states(self.code.encode(ids), layout)
        return hidden[-self.rows.block_size :].transpose(0, 1)
