"""What a run minimises and a step reports: one criterion for each kind of model, so that loop and step know neither."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_bitlm.method.objective import DenoisingObjective
from megatron_bitlm.model.bitlm import BitFlips, ScoredBlocks
from megatron_bitlm.model.softmax import ScoredTokens
from megatron_bitlm.training.metrics import NUM_SUMS, StepMetrics, step_sums


class Metrics(Protocol):
    """Figures of a step."""

    loss: float

    def record(self) -> dict[str, float]:
        """Flat names for logs."""


class Reported(NamedTuple):
    """What is left of a micro-batch, detached.

    sums: float32 [num_sums]; sample_losses: [B], each sample's part of the loss on this rank.
    """

    sums: Tensor
    sample_losses: Tensor


class Criterion(Protocol):
    """Scores micro-batches of one kind of model.

    Attributes:
        arguments: Keyword arguments of the model's forward pass, besides the micro-batch itself.
        num_sums: Length of the sums.
        is_sharded: Whether tensor-parallel ranks score different tokens, so that their sums have to be added up.
    """

    arguments: dict[str, Any]
    num_sums: int
    is_sharded: bool

    def loss(self, scored: Any) -> tuple[Tensor, Tensor, Reported]:
        """(sum over what this rank counts, int32 count of this context-parallel rank, what a step reports).

        megatron-core divides the sum of gradients by the global count, so a step is the same at every accumulation and
        layout (BitLM eq. 20).
        """

    def metrics(self, sums: Tensor) -> Metrics:
        """Figures from sums added over micro-batches and ranks."""


class DenoisingCriterion:
    """BitLM's: the denoising loss, mean over valid blocks.

    Args:
        objective: Scores blocks.
        block_size: M.
        sequence_parallel: Whether tensor-parallel ranks hold shards of the sequence.
    """

    num_sums = NUM_SUMS

    def __init__(self, objective: DenoisingObjective, *, block_size: int, sequence_parallel: bool) -> None:
        probability = objective.config.bit_flip_probability
        flips = BitFlips(probability, objective.seed) if probability > 0 else None
        self.arguments: dict[str, Any] = {"objective": objective, "flips": flips}
        self.block_size, self.is_sharded = block_size, sequence_parallel

    def loss(self, scored: ScoredBlocks) -> tuple[Tensor, Tensor, Reported]:
        """Sums over valid blocks; see `Criterion`."""
        total, sums = step_sums(scored.scores, scored.counts.valid, self.block_size)
        sample_losses = (scored.scores.objective.detach() * scored.counts.valid).sum(1)
        return total, scored.num_valid.int(), Reported(sums, sample_losses)

    def metrics(self, sums: Tensor) -> StepMetrics:
        """Loss, error by time and the rate of invalid codes."""
        return StepMetrics.from_sums(sums)


@dataclass
class CrossEntropyMetrics:
    """loss: nats per counted token; num_tokens: that were counted."""

    loss: float
    num_tokens: int

    def record(self) -> dict[str, float]:
        """Flat names for logs."""
        return {"loss": self.loss, "perplexity": math.exp(min(self.loss, 700.0))}


class CrossEntropyCriterion:
    """The softmax baseline's: next-token cross-entropy, mean over counted tokens (`method.blocks.counted_tokens`)."""

    num_sums = 2
    is_sharded = False  # megatron-core's cross-entropy gives every tensor-parallel rank all tokens

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}

    def loss(self, scored: ScoredTokens) -> tuple[Tensor, Tensor, Reported]:
        """Sums over counted tokens; see `Criterion`."""
        counted = scored.nats * scored.counted
        total = counted.sum()
        sums = torch.stack([total.detach(), scored.num_counted.float()])
        return total, scored.num_counted.int(), Reported(sums, counted.detach().sum(1))

    def metrics(self, sums: Tensor) -> CrossEntropyMetrics:
        """Loss in nats per token."""
        nats, tokens = sums.double().tolist()
        return CrossEntropyMetrics(nats / max(tokens, 1), int(tokens))
