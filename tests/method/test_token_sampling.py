"""Drawing tokens: frequencies against the distributions that the settings describe."""

import pytest
import torch

from megatron_bitlm.method.token_sampling import TokenSamplerConfig, choose_tokens

PROBABILITIES = torch.tensor([0.05, 0.4, 0.0, 0.3, 0.15, 0.1])
NUM = 20_000


def frequencies(**settings):
    """Of a grid of draws, so that the only error is the grid's."""
    config = TokenSamplerConfig(**settings)
    config.validate()
    draws = (torch.arange(NUM) + 0.5) / NUM
    ids = choose_tokens(PROBABILITIES.log().expand(NUM, -1), draws, config)
    return torch.bincount(ids, minlength=6) / NUM


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        ({"temperature": 0.0}, torch.tensor([0, 1.0, 0, 0, 0, 0])),
        ({"top_k": 2}, torch.tensor([0, 4 / 7, 0, 3 / 7, 0, 0])),
        ({"top_k": 1}, torch.tensor([0, 1.0, 0, 0, 0, 0])),
        ({"top_k": 100}, PROBABILITIES),
        # 0.4 + 0.3 falls short of 0.75: the third is the one that reaches it.
        ({"top_p": 0.75}, torch.tensor([0, 0.4, 0, 0.3, 0.15, 0]) / 0.85),
        ({"top_p": 1e-9}, torch.tensor([0, 1.0, 0, 0, 0, 0])),
        ({"top_k": 3, "top_p": 0.5}, torch.tensor([0, 4 / 7, 0, 3 / 7, 0, 0])),
    ],
)
def test_frequencies(settings, expected):
    torch.testing.assert_close(frequencies(**settings), expected, atol=2 / NUM, rtol=0)


def test_the_largest_draw_takes_no_impossible_token():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf, 5.0, -torch.inf]])
    draws = torch.tensor([1.0, 1.0])  # what rounding may make of a draw just below 1
    assert choose_tokens(logits, draws, TokenSamplerConfig()).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        TokenSamplerConfig(**settings).validate()
