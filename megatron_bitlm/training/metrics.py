"""What a step reports: sums over blocks that every layout adds up to the same figures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bitlm.method.objective import BlockLosses

NUM_TIME_BUCKETS = 10
# layout of the sums: objective, blocks, invalid slots, estimated slots, then error and count by time bucket
_FIXED = 4
NUM_SUMS = _FIXED + 2 * NUM_TIME_BUCKETS


def step_sums(losses: BlockLosses, valid: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(objective sum with gradient, all sums detached as float32 [NUM_SUMS]) over the valid blocks.

    `valid` is bool [B, N], `block_size` is M, the slots of a block; the objective sum counts every block once (the mean
    over its elements).
    """
    weight = valid.float()
    objective = (losses.objective * weight).sum()
    copies = losses.time.shape[0]
    bucket = (losses.time * NUM_TIME_BUCKETS).long().clamp(0, NUM_TIME_BUCKETS - 1).flatten()
    spread = weight.expand_as(losses.time).flatten()
    error = torch.zeros(NUM_TIME_BUCKETS, device=spread.device)
    count = torch.zeros_like(error)
    error.index_add_(0, bucket, losses.error.float().flatten() * spread)
    count.index_add_(0, bucket, spread)
    blocks = weight.sum()
    invalid = (losses.invalid * weight).sum()
    fixed = torch.stack([objective.detach(), blocks, invalid, blocks * copies * block_size])
    return objective, torch.cat([fixed, error, count])


@dataclass
class StepMetrics:
    """The figures of one step, from sums added over micro-batches and ranks."""

    loss: float
    mean_squared_error: float
    invalid_code_rate: float
    error_by_time: dict[str, float]
    num_blocks: int

    @classmethod
    def from_sums(cls, sums: Tensor) -> StepMetrics:
        """Read off float [NUM_SUMS]; empty time buckets are left out."""
        values = sums.double().tolist()
        objective, blocks, invalid, slots = values[:_FIXED]
        errors, counts = values[_FIXED : _FIXED + NUM_TIME_BUCKETS], values[_FIXED + NUM_TIME_BUCKETS :]
        by_time = {
            f"{i / NUM_TIME_BUCKETS:.1f}-{(i + 1) / NUM_TIME_BUCKETS:.1f}": e / c
            for i, (e, c) in enumerate(zip(errors, counts, strict=True))
            if c > 0
        }
        return cls(
            loss=objective / max(blocks, 1),
            mean_squared_error=sum(errors) / max(sum(counts), 1),
            invalid_code_rate=invalid / max(slots, 1),
            error_by_time=by_time,
            num_blocks=int(blocks),
        )

    def record(self) -> dict[str, float]:
        """Flat names for logs."""
        return {
            "loss": self.loss,
            "mean_squared_error": self.mean_squared_error,
            "invalid_code_rate": self.invalid_code_rate,
            **{f"error_by_time/{k}": v for k, v in self.error_by_time.items()},
        }
