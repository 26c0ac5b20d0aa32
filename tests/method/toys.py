"""A distribution small enough to be exact about: tokens of K bits with known probabilities."""

import torch
from torch import Tensor, nn

from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.head import Modulation


def zipf(num_tokens: int, exponent: float) -> Tensor:
    """p(y) ~ (y + 1)^-exponent, float64."""
    weights = torch.arange(1, num_tokens + 1, dtype=torch.float64) ** -exponent
    return weights / weights.sum()


def markov_pairs(num_tokens: int, sharpness: float, seed: int) -> Tensor:
    """Probabilities of two tokens in a row, float64 [num_tokens^2]: a uniform start and random transitions."""
    generator = torch.Generator().manual_seed(seed)
    scores = sharpness * torch.randn(num_tokens, num_tokens, generator=generator, dtype=torch.float64)
    return (scores.softmax(-1) / num_tokens).flatten()


class TokenToy:
    """Independent tokens with probabilities `probabilities` [V], V a power of two, and the exact posterior of bits."""

    def __init__(self, probabilities: Tensor) -> None:
        self.probabilities = probabilities.double()
        self.code = BinaryCode(len(probabilities))
        self.codes = self.code.encode(torch.arange(len(probabilities))).double()

    @property
    def entropy(self) -> float:
        """Nats per token."""
        return float(-(self.probabilities * self.probabilities.log()).sum())

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Codes of drawn tokens, float32 [num, 1, K]."""
        ids = torch.multinomial(self.probabilities, num, replacement=True, generator=generator)
        return self.codes[ids].float()[:, None]

    def logits(self, noisy: Tensor, time: Tensor) -> Tensor:
        """Exact marginal log-odds of every bit given a_t [..., K] at t [...], by Bayes' rule over all tokens."""
        t = time.double()[..., None]
        # |a - (1 - t) phi|^2 without the terms that all tokens share.
        score = self.probabilities.log() + (1 - t) / t.square() * (noisy.double() @ self.codes.T)
        weight = (score - score.amax(-1, keepdim=True)).exp()
        is_plus = (self.codes > 0).double()
        return (weight @ is_plus).clamp(min=1e-300).log() - (weight @ (1 - is_plus)).clamp(min=1e-300).log()


class ExactHead(nn.Module):
    """Stands in for `DiffusionHead`, with the toy's posterior as its conditional and `null` as its unconditional.

    `calls` records (rows, time of the first row) of every evaluation.
    """

    def __init__(self, toy: TokenToy, null: TokenToy | None = None, temperature: float = 1.0) -> None:
        super().__init__()
        self.toy, self.null_toy, self.temperature = toy, null or toy, temperature
        self.input = nn.Linear(toy.code.num_bits, 2)
        self.calls: list[tuple[int, float]] = []

    def embed_condition(self, condition: Tensor) -> Tensor:
        return torch.ones(len(condition), 1, 1)

    def null(self) -> Tensor:
        return torch.zeros(1, 1, 1)

    def modulation(self, embedded: Tensor, time: Tensor) -> Modulation:
        return Modulation([], embedded.expand(*time.shape, 1, 1))

    def denoise(self, noisy: Tensor, time: Tensor, modulation: Modulation) -> Tensor:
        self.calls.append((len(noisy), float(time[0])))
        t = time[:, None].expand(noisy.shape[:2])
        conditional = self.toy.logits(noisy, t)
        unconditional = self.null_toy.logits(noisy, t)
        return (torch.where(modulation.final > 0, conditional, unconditional) / self.temperature).float()
