"""Datasets of any size on disk that take none: the codes are a hole in the file, so every bit is 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_bitlm import __version__
from megatron_bitlm.data.card import Card, dataset_path, index_content
from megatron_bitlm.data.files import write_atomic
from megatron_bitlm.errors import BitLMError

_BLOCK_SIZE, _VOCAB_SIZE, _NUM_BITS = 4, 151_669, 18  # Qwen3's: 9 bytes a block


def write_sparse_dataset(prefix: Path, num_documents: int, num_bytes: int, seed: int = 0) -> Card:
    """A dataset of `num_documents` whose lengths are geometrically distributed and add up to about `num_bytes`.

    The card's checksums are left out: nothing may verify them.

    Raises:
        BitLMError: Less than three blocks a document.
    """
    block_bytes = _BLOCK_SIZE * _NUM_BITS // 8
    mean = num_bytes / block_bytes / max(num_documents, 1)
    if num_documents < 1 or mean <= 3:
        raise BitLMError(f"{num_bytes} bytes are too few for {num_documents} documents of at least 3 blocks")
    num_blocks_d = 2 + np.random.default_rng(seed).geometric(1 / (mean - 2), num_documents)
    index = index_content(num_blocks_d * block_bytes)
    write_atomic(dataset_path(prefix, ".idx"), index)
    total = int(num_blocks_d.sum()) * block_bytes
    with open(dataset_path(prefix, ".bin"), "wb") as stream:
        stream.truncate(total)
    card = Card(
        vocab_size=_VOCAB_SIZE,
        num_bits=_NUM_BITS,
        block_size=_BLOCK_SIZE,
        code_map_hash="identity",
        tokenizer_kind="none",
        tokenizer_fingerprint="none",
        bos_id=_VOCAB_SIZE - 2,
        eos_id=_VOCAB_SIZE - 1,
        num_documents=num_documents,
        num_empty_documents=0,
        num_blocks=int(num_blocks_d.sum()),
        num_text_tokens=int(num_blocks_d.sum() - 2 * num_documents) * _BLOCK_SIZE,
        num_text_bytes=0,
        bin_num_bytes=total,
        idx_num_bytes=len(index),
        bin_sha256="not computed",
        idx_sha256="not computed",
        settings={"sparse": True, "seed": seed},
        package_version=__version__,
    )
    write_atomic(dataset_path(prefix, ".json"), card.to_json())
    return card
