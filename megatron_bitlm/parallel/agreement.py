"""What all ranks that decode together must decide alike."""

import torch.distributed as dist
from torch import Tensor


def agreed(decided: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What the group's first rank decided, on every rank; alone, `decided` itself. Collective.

    Ranks that each decide by the same arithmetic do so alike, but one bit of difference would set them apart for good,
    and a rank that ends before the others leaves them waiting.
    """
    if group.size() == 1:
        return decided
    decided = decided.contiguous()
    dist.broadcast(decided, group_src=0, group=group)
    return decided
