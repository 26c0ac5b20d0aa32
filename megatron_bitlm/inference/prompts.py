"""What is asked of an engine, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.sampler import SamplerConfig
from megatron_bitlm.method.token_sampling import TokenSamplerConfig


@dataclass
class Generation:
    """What one prompt became.

    ids: new token ids, without the EOS; finished: EOS was generated; num_blocks: blocks denoised (none by a softmax);
    num_evaluations: of the head for these blocks (with and without the condition is one); num_invalid: slots whose
    final sign pattern belonged to no id and was moved to the nearest.
    """

    ids: list[int] = field(default_factory=list)
    finished: bool = False
    num_blocks: int = 0
    num_evaluations: int = 0
    num_invalid: int = 0


@dataclass(eq=False)
class Request:
    """A prompt to continue.

    prompt: token ids without framing, which may be none; max_new_tokens: limit; seed: keys all of its randomness, so
    that the result does not depend on what else is in the batch; sampler: of the kind of model at hand.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    seed: int = 0
    sampler: SamplerConfig | TokenSamplerConfig | None = None

    def check(self, vocab_size: int) -> None:
        """Raise BitLMError where ids, seed or the limit are out of range."""
        if self.max_new_tokens < 1:
            raise BitLMError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.seed < 2**63:
            raise BitLMError(f"seeds must lie in [0, 2^63), got {self.seed}")
        for token in self.prompt:
            if not 0 <= token < vocab_size:
                raise BitLMError(f"prompt id {token} is outside the vocabulary of {vocab_size}")


def make_requests(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    seeds: Sequence[int] | None,
    sampler: SamplerConfig | TokenSamplerConfig,
) -> list[Request]:
    """One request a prompt; seeds are 0, 1, ... by default.

    Raises:
        BitLMError: No prompts, or not as many seeds.
    """
    if not prompts:
        raise BitLMError("no prompts to continue")
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    if len(seeds) != len(prompts):
        raise BitLMError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    return [Request(list(p), max_new_tokens, seed, sampler) for p, seed in zip(prompts, seeds, strict=True)]
