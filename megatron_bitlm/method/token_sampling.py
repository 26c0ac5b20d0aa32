"""Choosing the next token of a softmax language model: greedy, or by temperature, top-k and top-p.

Shape legend: B rows, V ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class TokenSamplerConfig:
    """How tokens are drawn.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Only the k likeliest tokens; 0 takes all.
        top_p: Only the fewest likeliest tokens whose probabilities reach p (nucleus sampling, Holtzman et al., 2020).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def validate(self) -> None:
        """Raise ValueError naming the setting and its value."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")


def choose_tokens(logits: Tensor, draws: Tensor, config: TokenSamplerConfig) -> Tensor:
    """One id a row.

    Args:
        logits: floating [B, V]; -inf never wins.
        draws: uniform [B] in [0, 1), which decide; not looked at when temperature is 0.
        config: Of the sampler.

    Returns:
        int64 [B].
    """
    if config.temperature == 0:
        return logits.argmax(-1)
    if not config.top_k and config.top_p == 1:
        return _draw((logits.double() / config.temperature).softmax(-1), draws)
    ordered, ids = (logits.double() / config.temperature).sort(dim=-1, descending=True, stable=True)
    if config.top_k:
        ordered = ordered[:, : config.top_k]
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    # A token stays while those before it fall short of p; the first one always does.
    return ids.gather(1, _draw(probability * (before < config.top_p), draws)[:, None])[:, 0]


def _draw(probability: Tensor, draws: Tensor) -> Tensor:
    """Places [B] in `probability` [B, V], which need not add up to 1, that the uniform `draws` [B] fall on."""
    cumulative = probability.cumsum(-1)
    place = (cumulative <= draws.double()[:, None] * cumulative[:, -1:]).sum(-1)
    # Rounding must not step onto a token without probability.
    last = probability.shape[-1] - 1 - (probability > 0).flip(-1).byte().argmax(-1)
    return torch.minimum(place, last)
