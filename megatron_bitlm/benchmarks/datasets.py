"""Datasets to measure on: of any size that take no space on disk, and of random ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_bitlm import __version__
from megatron_bitlm.data.card import Card, dataset_path, index_content, read_card, read_document_lengths
from megatron_bitlm.data.files import write_atomic
from megatron_bitlm.data.framing import document_num_bytes, frame_documents, pack_documents
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.codes import BinaryCode

_INT32_CODE = 4  # Megatron's number for the dtype
_BLOCK_SIZE, _VOCAB_SIZE = 4, 151_669  # Qwen3's: 9 bytes a block


def write_sparse_dataset(prefix: Path, num_documents: int, num_bytes: int, seed: int = 0) -> Card:
    """A dataset of `num_documents` whose lengths are geometrically distributed and add up to about `num_bytes`.

    Its codes are a hole in the file: every bit is 0. The card's checksums are left out: nothing may verify them.

    Raises:
        BitLMError: Less than three blocks a document.
    """
    code = BinaryCode(_VOCAB_SIZE)
    block_bytes = _BLOCK_SIZE * code.num_bits // 8
    mean = num_bytes / block_bytes / max(num_documents, 1)
    if num_documents < 1 or mean <= 3:
        raise BitLMError(f"{num_bytes} bytes are too few for {num_documents} documents of at least 3 blocks")
    num_blocks_d = 2 + np.random.default_rng(seed).geometric(1 / (mean - 2), num_documents)
    with open(dataset_path(prefix, ".bin"), "wb") as stream:
        stream.truncate(int(num_blocks_d.sum()) * block_bytes)
    most_tokens = int(num_blocks_d.sum() - num_documents) * _BLOCK_SIZE - num_documents
    return _describe(prefix, code, _BLOCK_SIZE, num_blocks_d, most_tokens)


def write_sparse_int32_dataset(prefix: Path, like: Path) -> None:
    """Megatron's own kind of dataset, an int32 a token, with the documents of the dataset at `like`; every id is 0."""
    card = read_card(like)
    num_blocks_d = read_document_lengths(like, card).astype(np.int64) * 8 // card.block_bits
    num_tokens_d = num_blocks_d * card.block_size
    write_atomic(dataset_path(prefix, ".idx"), index_content(num_tokens_d, _INT32_CODE, 4))
    with open(dataset_path(prefix, ".bin"), "wb") as stream:
        stream.truncate(4 * int(num_tokens_d.sum()))


def write_random_dataset(
    prefix: Path, num_documents: int, tokens_per_document: int, *, vocab_size: int, block_size: int, seed: int = 0
) -> Card:
    """Documents of uniformly random ids, all of one length; BOS and EOS are the last two ids. No checksums."""
    code = BinaryCode(vocab_size)
    ids = np.random.default_rng(seed).integers(0, vocab_size - 2, num_documents * tokens_per_document)
    lengths = np.full(num_documents, tokens_per_document, dtype=np.int64)
    special = {"bos_id": vocab_size - 2, "eos_id": vocab_size - 1}
    framed, num_blocks_d = frame_documents(ids, lengths, block_size=block_size, **special)
    dataset_path(prefix, ".bin").write_bytes(pack_documents(framed, num_blocks_d, code, block_size).tobytes())
    return _describe(prefix, code, block_size, num_blocks_d, len(ids))


def _describe(prefix: Path, code: BinaryCode, block_size: int, num_blocks_d: np.ndarray, num_text_tokens: int) -> Card:
    """Writes index and card of a dataset without text."""
    num_bytes_d = document_num_bytes(num_blocks_d, block_size * code.num_bits)
    index = index_content(num_bytes_d)
    write_atomic(dataset_path(prefix, ".idx"), index)
    card = Card(
        vocab_size=code.vocab_size,
        num_bits=code.num_bits,
        block_size=block_size,
        code_map_hash=code.code_map_hash,
        tokenizer_kind="none",
        tokenizer_fingerprint="none",
        bos_id=code.vocab_size - 2,
        eos_id=code.vocab_size - 1,
        num_documents=len(num_blocks_d),
        num_empty_documents=0,
        num_blocks=int(num_blocks_d.sum()),
        num_text_tokens=num_text_tokens,
        num_text_bytes=0,
        bin_num_bytes=int(num_bytes_d.sum()),
        idx_num_bytes=len(index),
        bin_sha256="not computed",
        idx_sha256="not computed",
        settings={},
        package_version=__version__,
    )
    write_atomic(dataset_path(prefix, ".json"), card.to_json())
    return card
