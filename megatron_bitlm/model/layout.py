"""How documents lie in a batch: offsets, positions, and the keys and values of earlier blocks.

megatron-core hands `packed_seq_params` to every core attention untouched, so the layout travels as one. Its
own packed format ("thd") allows one row a micro-batch; ours keeps the batch dim ("sbhd") and describes the
documents by offsets into the flattened rows.
Shape legend: B batch, S sequence, M tokens of a block, T cached sequence, H key/value heads, D channels of a
head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_bitlm.method.attention_layout import BlockCausalLayout
from megatron_bitlm.method.attention_shard import SequenceShard


class KVCache:
    """Keys and values of the blocks seen so far, after RoPE.

    Args:
        batch_size: B.
        max_length: T, tokens a row can hold.
        key_start: int64 [B], the first visible token of each row where rows are padded on the left; None: all
            are.

    A layer's memory is allocated when it first stores, for the heads this rank holds.
    """

    def __init__(self, batch_size: int, max_length: int, key_start: Tensor | None = None) -> None:
        self.batch_size, self.max_length, self.key_start = batch_size, max_length, key_start
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer_number: int, key_BSHD: Tensor, value_BSHD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's new keys and values behind the `length` old ones.

        Returns:
            Keys and values of all `length + S` tokens, [B, length + S, H, D]: views of the cache.

        Raises:
            ValueError: where the cache is full.
        """
        num_rows, num_new = key_BSHD.shape[:2]
        end = self.length + num_new
        if end > self.max_length or num_rows != self.batch_size:
            raise ValueError(
                f"a cache of {self.batch_size} rows x {self.max_length} tokens cannot take {num_rows} rows x "
                f"{num_new} tokens behind {self.length}"
            )
        if layer_number not in self._layers:
            shape = (self.batch_size, self.max_length, *key_BSHD.shape[2:])
            self._layers[layer_number] = (key_BSHD.new_empty(shape), value_BSHD.new_empty(shape))
        keys, values = self._layers[layer_number]
        keys[:, self.length : end] = key_BSHD
        values[:, self.length : end] = value_BSHD
        return keys[:, :end], values[:, :end]

    def advance(self, num_tokens: int) -> None:
        """Counts tokens that every layer has stored."""
        self.length += num_tokens

    def truncate(self, length: int) -> None:
        """Forgets all tokens from `length` on, so that they can be written again."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a cache of {self.length} tokens to {length}")
        self.length = length


@dataclass
class SequenceLayout(PackedSeqParams):
    """Documents of one micro-batch; build it with one of the three class methods.

    attention: the documents of the whole rows, for attention; None behind a cache. positions: int64 [B, S], of a token
    in its document. rotary: cosines and sines of the positions, which the backbone adds. kv_cache: where there is one,
    keys and values are stored in it. shard: the tokens held here, where context-parallel ranks share the rows;
    positions are then theirs.
    """

    attention: BlockCausalLayout | None = None
    positions: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    kv_cache: KVCache | None = None
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
    def prompt(
        cls, kv_cache: KVCache, sequence_length: int, block_size: int, *, device: torch.device | str
    ) -> "SequenceLayout":
        """Layout of the prompts that fill an empty cache, one a row.

        Padding on the left (the cache's `key_start`, multiples of `block_size`) is kept apart, as a document
        of its own.

        Raises:
            ValueError: a cache that is not empty, or padding that is not whole blocks.
        """
        if kv_cache.length:
            raise ValueError("prompts fill an empty cache; use next_block() for what follows")
        batch_size = kv_cache.batch_size
        starts = [0] * batch_size if kv_cache.key_start is None else kv_cache.key_start.tolist()
        offsets = {batch_size * sequence_length}
        for row, start in enumerate(starts):
            offsets |= {row * sequence_length, row * sequence_length + start}
        layout = cls.from_batch(sorted(offsets), batch_size, sequence_length, block_size, device=device)
        layout.kv_cache = kv_cache
        return layout

    @classmethod
    def next_block(cls, kv_cache: KVCache, block_size: int, *, device: torch.device | str) -> "SequenceLayout":
        """Layout of one more block behind the cached tokens."""
        positions = torch.arange(kv_cache.length, kv_cache.length + block_size, device=device)
        positions = positions.expand(kv_cache.batch_size, block_size)
        if kv_cache.key_start is not None:
            positions = positions - kv_cache.key_start.to(device)[:, None]
        return cls(qkv_format="sbhd", positions=positions, kv_cache=kv_cache)

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
