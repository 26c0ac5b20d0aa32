"""Tokenizers behind one small interface: text to ids and back, exactly.

Text never yields the ids of BOS and EOS: whatever spells them in a document is encoded as plain text, so the
ids mark document boundaries and nothing else. The kinds other than ``bytes`` live in ``tokenizer_backends``.
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
        arrays = []
        for text in texts:
            ids = self._encode_array(text)
            if ids.size and bool(((ids == self.bos_id) | (ids == self.eos_id)).any()):
                raise BitLMError(
                    f"the {self.kind} tokenizer turns the text {text[:60]!r} into its own BOS or EOS id "
                    f"({self.bos_id}, {self.eos_id}): choose other tokens with bos_token and eos_token"
                )
            arrays.append(ids)
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


def load_tokenizer(
    spec: str | Path,
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    pattern: str | None = None,
) -> Tokenizer:
    """Tokenizer from a short name, a file, a folder or a hub name.

    Args:
        spec: ``bytes``; a ``tokenizer.json``; a SentencePiece ``*.model``; a ``*.tiktoken`` ranks file; a
            folder written by ``Tokenizer.save`` or by ``transformers``; or the name of a model on the Hugging
            Face hub.
        bos_token: token to use as BOS instead of the one found (Hugging Face and SentencePiece);
            ``add:TOKEN`` adds it to the vocabulary under a new id (Hugging Face).
        eos_token: the same for EOS.
        pattern: how a tiktoken ranks file splits text: ``qwen``, ``cl100k``, ``o200k``, ``gpt2`` or a regular
            expression; needed when the number of ranks is not one of theirs.

    Raises:
        BitLMError: no such tokenizer, broken files, or an option the kind does not take.
    """
    options = {"bos_token": bos_token, "eos_token": eos_token, "pattern": pattern}
    spec = str(spec)
    path = Path(spec).expanduser()
    if spec == "bytes":
        _refuse_options(spec, options)
        return BytesTokenizer()
    if spec.startswith("train:"):
        raise BitLMError(f"tokenizer {spec!r} is trained on a corpus, which only `bitlm preprocess` can do")
    if (path / DESCRIPTION_FILE).is_file():
        _refuse_options(spec, options)
        return _load_saved(path)
    return _load_foreign(spec, path, options)


def _load_foreign(spec: str, path: Path, options: dict[str, str | None]) -> Tokenizer:
    from megatron_bitlm.data import tokenizer_backends as backends

    specials = {name: options[name] for name in ("bos_token", "eos_token")}
    if path.is_file():
        if path.suffix == ".tiktoken":
            _refuse_options(spec, specials)
            return backends.TiktokenTokenizer(path.read_bytes(), options["pattern"], name=spec)
        _refuse_options(spec, {"pattern": options["pattern"]})
        if path.suffix == ".model":
            return backends.SentencePieceTokenizer(path.read_bytes(), name=spec, **specials)
        if path.suffix == ".json":
            return backends.huggingface_from_files(path, **specials)
        raise BitLMError(
            f"tokenizer {spec}: expected a tokenizer.json, a SentencePiece .model or a .tiktoken ranks file"
        )
    _refuse_options(spec, {"pattern": options["pattern"]})
    if (path / "tokenizer.json").is_file():
        return backends.huggingface_from_files(path / "tokenizer.json", **specials)
    looks_like_a_path = spec.startswith(("/", ".", "~")) or path.suffix in (".json", ".model", ".tiktoken")
    if looks_like_a_path and not path.exists():
        raise BitLMError(f"tokenizer {spec}: no such file or folder")
    return backends.huggingface_from_name(spec, **specials)


def _load_saved(folder: Path) -> Tokenizer:
    from megatron_bitlm.data import tokenizer_backends as backends

    try:
        description = json.loads((folder / DESCRIPTION_FILE).read_text())
        kind, options = description["kind"], description["options"]
        bos_id, eos_id = description["bos_id"], description["eos_id"]
        tokenizer: Tokenizer
        if kind == "bytes":
            tokenizer = BytesTokenizer()
        elif kind == "huggingface":
            content = (folder / "tokenizer.json").read_bytes()
            tokenizer = backends.HuggingFaceTokenizer(content, bos_id, eos_id, name=str(folder))
        elif kind == "sentencepiece":
            content = (folder / "tokenizer.model").read_bytes()
            tokenizer = backends.SentencePieceTokenizer(content, str(folder), bos_id=bos_id, eos_id=eos_id)
        elif kind == "tiktoken":
            content = (folder / "ranks.tiktoken").read_bytes()
            tokenizer = backends.TiktokenTokenizer(content, options["pattern"], name=str(folder))
        else:
            raise BitLMError(f"{folder / DESCRIPTION_FILE}: unknown tokenizer kind {kind!r}")
        expected = description["fingerprint"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise BitLMError(f"{folder}: not a complete saved tokenizer ({error!r})") from error
    if tokenizer.fingerprint != expected:
        raise BitLMError(f"{folder}: the tokenizer files were changed after they were saved")
    return tokenizer


def _refuse_options(spec: str, options: dict[str, str | None]) -> None:
    for name, value in options.items():
        if value is not None:
            raise BitLMError(f"{name}={value!r} does not apply to the tokenizer {spec!r}: leave it out")
