"""A batch of prompts to their ends, with one model and one sampler (BitLM algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from megatron_bitlm.inference.decoders import BlockDecoder, TokenDecoder
from megatron_bitlm.inference.engine import Decoder, Engine, Row
from megatron_bitlm.inference.prompts import Generation, Request, make_requests
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.path import TabulatedTime
from megatron_bitlm.method.sampler import SamplerConfig
from megatron_bitlm.method.token_sampling import TokenSamplerConfig
from megatron_bitlm.model.bitlm import BitLM
from megatron_bitlm.model.softmax import SoftmaxLM

# (number of the generated block, time, states [B, M, K] of the rows still running) at t = 1 and after every step
Observer = Callable[[int, float, Tensor], None]


class Generator:
    """Generates with a BitLM and fixed sampler settings.

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
        self.decoder = BlockDecoder(model, code, bos_id=bos_id, eos_id=eos_id, profile=profile)
        self.sampler, self.cached = sampler or SamplerConfig(), cached
        self.decoder.sampler(self.sampler)

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
        requests = make_requests(prompts, max_new_tokens, seeds, self.sampler)
        if observe is None:
            return _decode(self.decoder, requests, self.cached)

        def number_blocks(rows: list[Row], time: float, state: Tensor) -> None:
            observe(rows[0].result.num_blocks, time, state)

        return _decode(self.decoder, requests, self.cached, number_blocks)


class TokenGenerator:
    """Generates with the softmax baseline and fixed sampler settings.

    Args:
        model: On one pipeline stage, in eval mode.
        sampler: Temperature, top-k, top-p.
        cached: Keep keys and values between tokens; False runs the whole prefix again for every token.

    Raises:
        BitLMError: A sampler setting outside its range, or a model of another kind.
    """

    def __init__(self, model: SoftmaxLM, *, sampler: TokenSamplerConfig | None = None, cached: bool = True) -> None:
        self.decoder, self.sampler, self.cached = TokenDecoder(model), sampler or TokenSamplerConfig(), cached
        self.decoder.check(Request([], 1, 0, self.sampler))

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, seeds: Sequence[int] | None = None
    ) -> list[Generation]:
        """Continue every prompt until EOS or `max_new_tokens`; arguments and errors as `Generator.generate`."""
        return _decode(self.decoder, make_requests(prompts, max_new_tokens, seeds, self.sampler), self.cached)


def _decode(decoder: Decoder, requests: list[Request], cached: bool, observe: object = None) -> list[Generation]:
    """All requests in one batch, in a cache just as long as the longest may become."""
    longest = max(len(decoder.frame(r.prompt)) + r.max_new_tokens for r in requests)
    max_length = (longest // decoder.block_size + 1) * decoder.block_size
    engine = Engine(decoder, max_batch_size=len(requests), max_length=max_length, cached=cached)
    return engine.run(requests, observe)
