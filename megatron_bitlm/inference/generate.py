"""Block-wise generation with a KV cache (BitLM algorithm 2).

Prompts are framed as in training (M BOS tokens first) and padded on the left by whole blocks, so that all rows of a
batch end together; padding is invisible to attention and positions. The known tokens of a prompt's last, partial
block are held to their codes while the open slots are denoised.
Shape legend: B rows, M slots, K bits, D backbone width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.inference.prompts import CachedBackbone, Generation, Rows, check_request
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.noise import Stream, normal
from megatron_bitlm.method.path import TabulatedTime
from megatron_bitlm.method.sampler import BlockSampler, SamplerConfig
from megatron_bitlm.model.bitlm import BitLM
from megatron_bitlm.model.layout import SequenceLayout

# (number of the generated block, time, state [B, M, K]) at t = 1 and after every denoising step
Observer = Callable[[int, float, Tensor], None]


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
        BitLMError: A sampler setting outside its range, or a model of another kind.
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
        if not isinstance(model, BitLM):
            raise BitLMError("a softmax model (model.output softmax) has no blocks to denoise; use TokenGenerator")
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
        check_request(prompts, max_new_tokens, seeds, self.code.vocab_size)
        rows = Rows(prompts, self.block_size, self.bos_id, self.device)
        num_open = max_new_tokens + max(rows.num_known)
        num_new_blocks = -(-num_open // self.block_size)
        results = [Generation() for _ in prompts]
        backbone = CachedBackbone(self._states, rows, num_new_blocks, self.cached)
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

    def _states(self, ids: Tensor, layout: SequenceLayout) -> Tensor:
        return self.model.states(self.code.encode(ids), layout)

    def _sample_block(
        self,
        number: int,
        condition: Tensor,
        key: Tensor,
        rows: Rows,
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
        rows: Rows,
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
