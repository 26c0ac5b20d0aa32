"""What every generator needs: prompts framed and padded to a batch, and the backbone's states behind them, cached.

Shape legend: B rows, S tokens, M slots of a block, D backbone width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.sampler import KnownSlots
from megatron_bitlm.model.layout import KVCache, SequenceLayout

# Final states [S, B, D] of ids [B, S] in a layout.
States = Callable[[Tensor, SequenceLayout], Tensor]


@dataclass
class Generation:
    """What one prompt became.

    ids: new token ids, without the EOS; finished: EOS was generated; num_blocks: blocks denoised (none by a softmax);
    num_invalid: slots whose final sign pattern belonged to no id and was moved to the nearest.
    """

    ids: list[int] = field(default_factory=list)
    finished: bool = False
    num_blocks: int = 0
    num_invalid: int = 0


def check_request(prompts: list[list[int]], max_new_tokens: int, seeds: list[int], vocab_size: int) -> None:
    """Raise BitLMError where there are no prompts, or ids, seeds or the limit are out of range."""
    if not prompts:
        raise BitLMError("no prompts to continue")
    if max_new_tokens < 1:
        raise BitLMError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if len(seeds) != len(prompts):
        raise BitLMError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    if any(not 0 <= seed < 2**63 for seed in seeds):
        raise BitLMError(f"seeds must lie in [0, 2^63), got {seeds}")
    for prompt in prompts:
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise BitLMError(f"prompt id {token} is outside the vocabulary of {vocab_size}")


class Rows:
    """Framed prompts: whole blocks padded on the left, and the partial last block of each."""

    def __init__(self, prompts: list[list[int]], block_size: int, bos_id: int, device: torch.device) -> None:
        framed = [[bos_id] * block_size + prompt for prompt in prompts]
        self.num_full = [len(ids) // block_size for ids in framed]
        self.num_known = [len(ids) % block_size for ids in framed]
        self.block_size, self.device = block_size, device
        widest = max(self.num_full)
        # Padding may be any id: nothing sees it.
        self.full = torch.tensor(
            [
                [bos_id] * ((widest - full) * block_size) + ids[: full * block_size]
                for ids, full in zip(framed, self.num_full, strict=True)
            ],
            device=device,
        )
        self.key_start = torch.tensor([(widest - full) * block_size for full in self.num_full], device=device)
        partial = torch.full((len(framed), block_size), bos_id, device=device)
        for row, (ids, full, count) in enumerate(zip(framed, self.num_full, self.num_known, strict=True)):
            if count:
                partial[row, :count] = torch.tensor(ids[full * block_size :], device=device)
        self.partial = partial

    def known(self, code: BinaryCode) -> KnownSlots | None:
        """Slots of the first generated block that the prompts fix, or None."""
        if not any(self.num_known):
            return None
        slots = torch.arange(self.block_size, device=self.device)
        mask = slots[None, :] < torch.tensor(self.num_known, device=self.device)[:, None]
        return KnownSlots(code.encode(self.partial), mask)


class CachedBackbone:
    """Final states of the newest block, from the cache or from the whole prefix.

    Args:
        states: Final states [S, B, D] of ids [B, S] in a layout.
        rows: The prompts.
        num_new_blocks: Blocks that will follow, for the cache's size.
        cached: Keep keys and values between blocks; False runs the whole prefix again for every block.
    """

    def __init__(self, states: States, rows: Rows, num_new_blocks: int, cached: bool) -> None:
        self.states, self.rows, self.cached = states, rows, cached
        self.ids = rows.full
        self.capacity = rows.full.shape[1] + num_new_blocks * rows.block_size
        self.cache = self._new_cache()

    def _new_cache(self) -> KVCache:
        key_start = self.rows.key_start if bool((self.rows.key_start > 0).any()) else None
        return KVCache(self.ids.shape[0], self.capacity, key_start)

    def prefill(self) -> Tensor:
        """Read the prompts; C of the last block, [B, M, D]."""
        return self._whole()

    def commit(self, ids: Tensor) -> Tensor:
        """Append realised ids [B, M] and return their C; this pass also stores their keys and values."""
        self.ids = torch.cat([self.ids, ids], dim=1)
        if not self.cached:
            self.cache = self._new_cache()
            return self._whole()
        layout = SequenceLayout.next_block(self.cache, self.rows.block_size, device=ids.device)
        return self._states(ids, layout)

    def _whole(self) -> Tensor:
        layout = SequenceLayout.prompt(self.cache, self.ids.shape[1], self.rows.block_size, device=self.ids.device)
        return self._states(self.ids, layout)

    def _states(self, ids: Tensor, layout: SequenceLayout) -> Tensor:
        hidden = self.states(ids, layout)
        return hidden[-self.rows.block_size :].transpose(0, 1)
