"""Tokenizers behind one small interface: text to ids and back, exactly.

Text never yields the ids of BOS and EOS: whatever spells them in a document is encoded as plain text, so the
ids mark document boundaries and nothing else. The kinds other than ``bytes`` live in ``tokenizer_backends``;
``tokenizer_loading`` finds the one that is meant.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bitlm.data.files import write_atomic
from megatron_bitlm.errors import BitLMError

DESCRIPTION_FILE = "bitlm_tokenizer.json"


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        kind: ``bytes``, ``huggingface``, ``sentencepiece`` or ``tiktoken``.
        vocab_size: V, the highest id plus one.
        bos_id: id put before every document, never produced by text.
        eos_id: id put after every document, never produced by text, different from ``bos_id``.
    """

    kind: str
    vocab_size: int
    bos_id: int
    eos_id: int

    @abstractmethod
    def _encode_array(self, text: str) -> np.ndarray:
        """Integer ids of one text, int64 [n]; may be a shared buffer of another integer type."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of ids in [0, V) without BOS and EOS."""

    @abstractmethod
    def token_num_bytes(self) -> np.ndarray:
        """UTF-8 bytes each id stands for, int64 [V]; 0 for special and unused ids."""

    @abstractmethod
    def _content(self) -> dict[str, bytes]:
        """Files that define the tokenizer, by name; they are what ``save`` writes and ``fingerprint``
        covers."""

    def _options(self) -> dict[str, Any]:
        """Settings that ``load_tokenizer`` needs beside the files."""
        return {}

    @property
    def fingerprint(self) -> str:
        """sha256 in hexadecimal over everything that changes ids."""
        parts = [json.dumps(self._description_core(), sort_keys=True).encode()]
        for name, content in sorted(self._content().items()):
            parts += [name.encode(), hashlib.sha256(content).digest()]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts, one integer array [n] each.

        Raises:
            BitLMError: the tokenizer gave its own BOS or EOS for text.
        """
        arrays = [self._encode_array(text) for text in texts]
        ids = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
        if bool(((ids == self.bos_id) | (ids == self.eos_id)).any()):
            reserved = [self.bos_id, self.eos_id]
            text = next(t for t, ids in zip(texts, arrays, strict=True) if np.isin(ids, reserved).any())
            raise BitLMError(
                f"the {self.kind} tokenizer turns the text {text[:60]!r} into its own BOS or EOS id "
                f"({self.bos_id}, {self.eos_id}): choose other tokens with bos_token and eos_token"
            )
        return arrays

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without BOS and EOS."""
        return self.encode_arrays([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, without BOS and EOS."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; BOS, EOS and other special ids are dropped, broken UTF-8 becomes U+FFFD.

        Raises:
            ValueError: an id outside [0, V).
        """
        kept = [int(token) for token in ids]
        if kept and not (min(kept) >= 0 and max(kept) < self.vocab_size):
            bad = min(kept) if min(kept) < 0 else max(kept)
            raise ValueError(f"cannot decode id {bad}, outside [0, {self.vocab_size})")
        return self._decode([token for token in kept if token not in (self.bos_id, self.eos_id)])

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer to a folder that ``load_tokenizer`` reads back, description last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._content().items():
            write_atomic(folder / name, content)
        description = {**self._description_core(), "fingerprint": self.fingerprint}
        write_atomic(folder / DESCRIPTION_FILE, (json.dumps(description, indent=2) + "\n").encode())

    def _description_core(self) -> dict[str, Any]:
        core = {name: getattr(self, name) for name in ("kind", "vocab_size", "bos_id", "eos_id")}
        return {**core, "options": self._options()}


class BytesTokenizer(Tokenizer):
    """Ids 0 to 255 are the UTF-8 bytes, 256 is BOS and 257 EOS: V = 258, 9 bits."""

    kind = "bytes"
    vocab_size = 258
    bos_id = 256
    eos_id = 257

    def _encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def token_num_bytes(self) -> np.ndarray:
        """UTF-8 bytes each id stands for, int64 [V]; 0 for BOS and EOS."""
        return (np.arange(self.vocab_size) < 256).astype(np.int64)

    def _content(self) -> dict[str, bytes]:
        return {}
