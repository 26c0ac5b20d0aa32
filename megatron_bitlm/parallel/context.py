"""Keys and values of whole rows on every context-parallel rank.

Shape legend: L a rank's tokens of a row, S all of them, C a chunk's; the tokens come first.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherTokens(torch.autograd.Function):
    """[L, ...] of every rank -> [S, ...] in the order of the row; backward adds up what every rank's part got."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        by_rank = own.new_empty((group.size() * own.shape[0], *own.shape[1:]))
        dist.all_gather_into_tensor(by_rank, own.contiguous(), group=group)
        # Rank r holds chunks r and 2R-1-r: first chunks ascend and second ones descend with the rank.
        chunks = by_rank.unflatten(0, (group.size(), 2, -1))
        return torch.cat([chunks[:, 0], chunks[:, 1].flip(0)]).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        size = ctx.group.size()
        chunks = grad.unflatten(0, (2 * size, -1))
        by_rank = torch.stack([chunks[:size], chunks[size:].flip(0)], 1).flatten(0, 2)
        own = grad.new_empty((by_rank.shape[0] // size, *grad.shape[1:]))
        dist.reduce_scatter_tensor(own, by_rank, group=ctx.group)
        return own, None


def gather_keys_values(key: Tensor, value: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values [L, B, H, D] of this rank's chunks -> those of the whole rows [S, B, H, D], in one message."""
    both = _GatherTokens.apply(torch.stack((key, value), 1), group)
    return both[:, 0], both[:, 1]
