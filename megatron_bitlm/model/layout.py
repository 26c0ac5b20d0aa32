"""How documents lie in a batch: offsets, positions, and the keys and values of earlier blocks.

megatron-core hands `packed_seq_params` to every core attention untouched, so the layout travels as one. Its
own packed format ("thd") allows one row a micro-batch; ours keeps the batch dim ("sbhd") and describes the
documents by offsets into the flattened rows.
Shape legend: B batch, S sequence, M tokens of a block, R rows and T tokens of a cache, H key/value heads, D channels of
a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_bitlm.method.attention_layout import BlockCausalLayout
from megatron_bitlm.method.attention_shard import SequenceShard


class KVCache:
    """Keys and values after RoPE, of rows that begin, grow and end independently of each other.

    Args:
        num_rows: R, sequences held at a time.
        max_length: T, tokens a row can hold.

    A layer's memory is allocated when it first stores, for the heads this rank holds.
    """

    def __init__(self, num_rows: int, max_length: int) -> None:
        self.num_rows, self.max_length = num_rows, max_length
        self.lengths = [0] * num_rows
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, T, H, D] of a layer, for keys `like` [..., H, D]."""
        if number not in self._layers:
            shape = (self.num_rows, self.max_length, *like.shape[-2:])
            # Not empty: attention gives what it does not see weight zero, and zero times NaN is NaN.
            self._layers[number] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[number]

    def check_room(self, row: int, num_new: int) -> None:
        """Raise ValueError where a row cannot take `num_new` more tokens."""
        if self.lengths[row] + num_new > self.max_length:
            raise ValueError(
                f"row {row} of a cache of {self.max_length} tokens cannot take {num_new} behind {self.lengths[row]}"
            )

    def move(self, source: int, target: int) -> None:
        """Give row `target` what row `source` holds, which becomes empty."""
        length = self.lengths[source]
        for keys, values in self._layers.values():
            keys[target, :length] = keys[source, :length]
            values[target, :length] = values[source, :length]
        self.lengths[target], self.lengths[source] = length, 0

    def release(self, row: int) -> None:
        """Empty a row."""
        self.lengths[row] = 0


class PromptPass:
    """A pass over prompts that lie one behind the other in a batch of one row, and fill empty rows of a cache."""

    key_stop = None

    def __init__(self, cache: KVCache, rows: Sequence[int], lengths: Sequence[int]) -> None:
        for row, length in zip(rows, lengths, strict=True):
            if cache.lengths[row]:
                raise ValueError(f"row {row} of the cache holds {cache.lengths[row]} tokens; prompts fill empty rows")
            cache.check_room(row, length)
        self.cache, self.rows, self.lengths = cache, rows, lengths

    def append(self, layer_number: int, key_1SHD: Tensor, value_1SHD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values; returns them as they came."""
        keys, values = self.cache.layer(layer_number, key_1SHD)
        start = 0
        for row, length in zip(self.rows, self.lengths, strict=True):
            keys[row, :length] = key_1SHD[0, start : start + length]
            values[row, :length] = value_1SHD[0, start : start + length]
            start += length
        return key_1SHD, value_1SHD

    def finish(self) -> None:
        """Count the tokens that every layer has stored."""
        for row, length in zip(self.rows, self.lengths, strict=True):
            self.cache.lengths[row] = length


class BlockPass:
    """A pass over one more block of each of the first `num_rows` rows of a cache.

    key_stop: int64 [num_rows], the end of each row with its new block; None where all end together.
    """

    def __init__(self, cache: KVCache, num_rows: int, block_size: int, device: torch.device | str) -> None:
        for row in range(num_rows):
            cache.check_room(row, block_size)
        self.cache, self.num_rows, self.block_size = cache, num_rows, block_size
        starts = cache.lengths[:num_rows]
        self.start, self.end = max(starts), max(starts) + block_size
        slots = torch.arange(block_size, device=device)
        self.positions = torch.tensor(starts, device=device)[:, None] + slots
        self.key_stop = None if min(starts) == self.start else self.positions[:, -1] + 1

    def append(self, layer_number: int, key_BMHD: Tensor, value_BMHD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; returns views of all [B, end, H, D], stale from `key_stop` on."""
        stored = self.cache.layer(layer_number, key_BMHD)
        for old, new in zip(stored, (key_BMHD, value_BMHD), strict=True):
            if self.key_stop is None:
                old[: self.num_rows, self.start : self.end] = new
            else:
                old[torch.arange(self.num_rows, device=new.device)[:, None], self.positions] = new
        keys, values = stored
        return keys[: self.num_rows, : self.end], values[: self.num_rows, : self.end]

    def finish(self) -> None:
        """Count the tokens that every layer has stored."""
        for row in range(self.num_rows):
            self.cache.lengths[row] += self.block_size


@dataclass
class SequenceLayout(PackedSeqParams):
    """Documents of one micro-batch; build it with one of the three class methods.

    attention: the documents of the whole rows, for attention; None behind a cache. positions: int64 [B, S], of a token
    in its document. rotary: cosines and sines of the positions, which the backbone adds. kv_cache: where there is one,
    keys and values are stored through it. shard: the tokens held here, where context-parallel ranks share the rows;
    positions are then theirs.
    """

    attention: BlockCausalLayout | None = None
    positions: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    kv_cache: PromptPass | BlockPass | None = None
    shard: SequenceShard | None = None

    @classmethod
    def from_batch(
        cls,
        cu_seqlens: Tensor | Sequence[int] | None,
        batch_size: int,
        sequence_length: int,
        block_size: int,
        *,
        device: torch.device | str = "cpu",
    ) -> "SequenceLayout":
        """Layout of packed documents.

        Args:
            cu_seqlens: int [documents + 1], offsets into the flattened tokens: 0, ..., batch_size *
                sequence_length, with the start of every row among them. On the CPU, where reading it waits
                for no device. None makes each row one document.
            batch_size: B.
            sequence_length: S.
            block_size: M; every offset is a multiple of it.
            device: of the model.

        Raises:
            ValueError: offsets that do not describe such a batch.
        """
        documents = BlockCausalLayout.build(batch_size, sequence_length, block_size, cu_seqlens)
        starts, ends = torch.tensor(documents.cu_seqlens[:-1]), torch.tensor(documents.cu_seqlens[1:])
        positions = torch.arange(batch_size * sequence_length) - starts.repeat_interleave(ends - starts)
        return cls(
            qkv_format="sbhd",
            attention=documents,
            positions=positions.view(batch_size, sequence_length).to(device, non_blocking=True),
        )

    @classmethod
    def prompts(
        cls,
        cache: KVCache,
        rows: Sequence[int],
        lengths: Sequence[int],
        block_size: int,
        *,
        device: torch.device | str,
    ) -> "SequenceLayout":
        """Layout of prompts of `lengths` tokens, whole blocks, that lie one behind the other in a batch of one row.

        They fill the empty `rows` of the cache.

        Raises:
            ValueError: a row of the cache that is not empty or too short, or a prompt that is not whole blocks.
        """
        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        layout = cls.from_batch(offsets, 1, offsets[-1], block_size, device=device)
        layout.kv_cache = PromptPass(cache, rows, lengths)
        return layout

    @classmethod
    def next_blocks(
        cls, cache: KVCache, num_rows: int, block_size: int, *, device: torch.device | str
    ) -> "SequenceLayout":
        """Layout of one more block behind each of the first `num_rows` rows of a cache, a batch of as many rows.

        Raises:
            ValueError: a row that is full.
        """
        stored = BlockPass(cache, num_rows, block_size, device)
        return cls(qkv_format="sbhd", positions=stored.positions, kv_cache=stored)

    def for_context_rank(self, rank: int, num_ranks: int) -> "SequenceLayout":
        """The layout of the tokens that one of `num_ranks` context-parallel ranks holds; of one rank, this layout.

        Raises:
            ValueError: rows that do not divide into two chunks of whole blocks a rank, or a layout with a cache.
        """
        if num_ranks == 1 or self.shard is not None:
            return self
        if self.kv_cache is not None or self.attention is None:
            raise ValueError("decoding with a cache runs on one context-parallel rank")
        documents = self.attention
        # The layers, chunks and recomputations of a micro-batch share one object, and so its masks.
        shard = documents.keep(
            f"shard {rank} of {num_ranks}",
            torch.device("cpu"),
            lambda: SequenceShard.build(documents, rank, num_ranks),
        )
        return replace(self, shard=shard, positions=shard.take(self.positions))

    def blocks(self, num_blocks: int) -> Tensor:
        """Numbers, inside the sample, of the blocks held here, of `num_blocks` in all: int64 [blocks held]."""
        device = self.positions.device
        return torch.arange(num_blocks, device=device) if self.shard is None else self.shard.blocks_on(device)
