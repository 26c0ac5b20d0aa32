"""Token-by-token generation with the softmax baseline and a KV cache.

Prompts are framed as in the data (M BOS tokens first) and padded on the left, as `inference.generate` does.
Shape legend: B rows, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.inference.prompts import CachedBackbone, Generation, Rows, check_request
from megatron_bitlm.method.noise import Stream, uniform
from megatron_bitlm.method.token_sampling import TokenSamplerConfig, choose_tokens
from megatron_bitlm.model.softmax import SoftmaxLM


class TokenGenerator:
    """Generates with one model and fixed sampler settings.

    Args:
        model: On one pipeline stage, in eval mode.
        sampler: Temperature, top-k, top-p.
        cached: Keep keys and values between tokens; False runs the whole prefix again for every token.

    Raises:
        BitLMError: A sampler setting outside its range, or a model of another kind.
    """

    def __init__(self, model: SoftmaxLM, *, sampler: TokenSamplerConfig | None = None, cached: bool = True) -> None:
        if not isinstance(model, SoftmaxLM):
            raise BitLMError("a BitLM (model.output diffusion) has no softmax to draw tokens from; use Generator")
        self.model, self.sampler, self.cached = model, sampler or TokenSamplerConfig(), cached
        try:
            self.sampler.validate()
        except ValueError as error:
            raise BitLMError(f"sampler: {error}") from error
        self.device = model.input_module.word_embeddings.weight.device

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, seeds: Sequence[int] | None = None
    ) -> list[Generation]:
        """Continue every prompt until EOS or `max_new_tokens`.

        Args:
            prompts: Token ids without framing, one list a row; empty is allowed.
            max_new_tokens: New tokens a row.
            seeds: One seed a row (its result does not depend on the other rows); 0, 1, ... by default.

        Raises:
            BitLMError: No prompts, ids outside the vocabulary, or settings out of range.
        """
        prompts = [list(prompt) for prompt in prompts]
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        check_request(prompts, max_new_tokens, seeds, self.model.code.vocab_size)
        frame = [self.model.bos_id] * (self.model.block_size - 1)  # and one more from the rows
        rows = Rows([frame + prompt for prompt in prompts], 1, self.model.bos_id, self.device)
        results = [Generation() for _ in prompts]
        backbone = CachedBackbone(self.model.states, rows, max_new_tokens, self.cached)
        state = backbone.prefill()
        key = torch.tensor(seeds, dtype=torch.int64, device=self.device)
        for number in range(max_new_tokens):
            ids = self._next_ids(state, key, torch.tensor(rows.num_full, device=self.device) + number)
            self._collect(ids, results)
            if number == max_new_tokens - 1 or all(result.finished for result in results):
                break
            state = backbone.commit(ids[:, None])
        return results

    def _next_ids(self, state: Tensor, key: Tensor, place: Tensor) -> Tensor:
        """Ids [B] behind the states [B, 1, D]; draws are numbered from each row's own start, not from its padding."""
        logits = self.model.logits(state.transpose(0, 1))[0]
        high, low = uniform(0, Stream.TOKEN_SAMPLER, key, place, 2).double().unbind(-1)
        return choose_tokens(logits[:, : self.model.code.vocab_size], high + low * 2.0**-24, self.sampler)

    def _collect(self, ids: Tensor, results: list[Generation]) -> None:
        """Append each open row's new token, or end it."""
        for result, token in zip(results, ids.tolist(), strict=True):
            if result.finished:
                continue
            if token == self.model.eos_id:
                result.finished = True
            else:
                result.ids.append(token)
