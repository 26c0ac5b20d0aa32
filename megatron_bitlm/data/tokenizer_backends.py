"""Tokenizers read from other people's files: Hugging Face, SentencePiece, tiktoken ranks; and trained BPE."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bitlm.data.byte_pairs import MAX_SPACE_RUN, LibraryEncoder, has_long_space_run
from megatron_bitlm.data.split_patterns import PATTERN_OF_NUM_RANKS, SPLIT_PATTERNS
from megatron_bitlm.data.tokenizer import Tokenizer
from megatron_bitlm.errors import BitLMError

TRAINED_BOS = "<|bos|>"
TRAINED_EOS = "<|eos|>"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BOS_CANDIDATES = ("<|im_start|>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "<s>", "<bos>", "[CLS]")
_EOS_CANDIDATES = ("<|eos|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")


class TiktokenTokenizer(Tokenizer):
    """Byte-pair ranks in tiktoken's text format: n ranks, EOS = n, BOS = n + 1, V = n + 2.

    With Qwen's 151,643 ranks EOS is ``<|endoftext|>`` and BOS ``<|im_start|>``.

    Args:
        content: the ranks file, one ``base64 rank`` a line, ranks 0 ... n-1.
        pattern: name of a known split pattern, a regular expression, or None to choose by n.
        name: what error messages call the file.

    Raises:
        BitLMError: broken file, or no pattern known for n.
    """

    kind = "tiktoken"

    def __init__(self, content: bytes, pattern: str | None, name: str) -> None:
        import tiktoken

        self._ranks_file = content
        ranks = _parse_ranks(content, name)
        if pattern is None:
            if len(ranks) not in PATTERN_OF_NUM_RANKS:
                known = ", ".join(f"{n} ({key})" for n, key in PATTERN_OF_NUM_RANKS.items())
                raise BitLMError(
                    f"tokenizer {name}: {len(ranks)} ranks is none of the known sets {known}; set `pattern` "
                    "to qwen, cl100k, o200k, gpt2 or a regular expression"
                )
            pattern = PATTERN_OF_NUM_RANKS[len(ranks)]
        self._pattern = SPLIT_PATTERNS.get(pattern, pattern)
        self.eos_id, self.bos_id = len(ranks), len(ranks) + 1
        self.vocab_size = len(ranks) + 2
        try:
            self._encoding = tiktoken.Encoding(
                name="bitlm", pat_str=self._pattern, mergeable_ranks=ranks, special_tokens={}
            )
        except ValueError as error:
            raise BitLMError(f"tokenizer {name}: pattern {pattern!r} is not accepted ({error})") from error

    @property
    def pattern(self) -> str:
        """Regular expression that splits text before merging."""
        return self._pattern

    @property
    def ranks(self) -> dict[bytes, int]:
        """Every token's bytes and its id."""
        return _parse_ranks(self._ranks_file, "ranks.tiktoken")

    def _encode_array(self, text: str) -> np.ndarray:
        if has_long_space_run(text):
            raise BitLMError(
                f"a text of {len(text)} characters, {text[:40]!r} ..., has {MAX_SPACE_RUN} or more white-space "
                "characters in a row, which tiktoken may not survive: shorten such runs, or use the tokenizer.json"
            )
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_num_bytes(self) -> np.ndarray:
        """UTF-8 bytes each id stands for, int64 [V]; 0 for BOS and EOS."""
        lengths = [len(self._encoding.decode_single_token_bytes(token)) for token in range(self.vocab_size - 2)]
        return np.array([*lengths, 0, 0], dtype=np.int64)

    def _content(self) -> dict[str, bytes]:
        return {"ranks.tiktoken": self._ranks_file}

    def _options(self) -> dict[str, Any]:
        return {"pattern": self._pattern}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; BOS and EOS are its control pieces unless named.

    Decoding returns the text as the model normalised it: many models fold Unicode forms and spaces.

    Raises:
        BitLMError: broken file, no BOS or EOS in the model, or both the same.
    """

    kind = "sentencepiece"

    def __init__(
        self,
        content: bytes,
        name: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
    ) -> None:
        import sentencepiece

        self._model_file = content
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise BitLMError(f"tokenizer {name}: not a SentencePiece model ({error})") from error
        self.vocab_size = self._processor.get_piece_size()
        self.bos_id = self._special("bos", bos_token, bos_id, name)
        self.eos_id = self._special("eos", eos_token, eos_id, name)
        _check_specials(self.bos_id, self.eos_id, name)

    def _special(self, which: str, token: str | None, saved_id: int | None, name: str) -> int:
        if saved_id is not None:
            return saved_id
        if token is not None:
            found = self._processor.piece_to_id(token)
            if self._processor.id_to_piece(found) != token:
                raise BitLMError(f"tokenizer {name}: {which}_token {token!r} is not one of its pieces")
            return found
        found = self._processor.bos_id() if which == "bos" else self._processor.eos_id()
        if found < 0:
            raise BitLMError(f"tokenizer {name}: the model has no {which.upper()} piece; name one with {which}_token")
        return found

    def _encode_array(self, text: str) -> np.ndarray:
        return np.asarray(self._processor.encode(text, out_type=int), dtype=np.int64)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def token_num_bytes(self) -> np.ndarray:
        """UTF-8 bytes each id stands for, int64 [V]; 0 for control and unknown pieces."""
        model = self._processor
        num_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        for token in range(self.vocab_size):
            if not (model.is_control(token) or model.is_unknown(token) or model.is_unused(token)):
                num_bytes[token] = _piece_num_bytes(model.id_to_piece(token))
        num_bytes[[self.bos_id, self.eos_id]] = 0
        return num_bytes

    def _content(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._model_file}


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the ``tokenizers`` library.

    Special tokens in text are encoded as plain text. A normaliser in the file (Qwen's own has NFC) acts on
    text before it is encoded, and decoding then returns the normalised text.

    Much text is encoded by tiktoken where it gives the same ids (see `byte_pairs`).

    Args:
        content: tokenizer.json.
        bos_id, eos_id: the ids that frame documents.
        name: what error messages call the file.
        description: ``content`` parsed, where the caller has it.

    Raises:
        BitLMError: the file cannot be read, or BOS and EOS are the same id.
    """

    kind = "huggingface"

    def __init__(
        self, content: bytes, bos_id: int, eos_id: int, name: str, description: dict[str, Any] | None = None
    ) -> None:
        self._json_file = content
        self.bos_id, self.eos_id = bos_id, eos_id
        _check_specials(bos_id, eos_id, name)
        self._description = description or _parse_tokenizer_json(content, name)
        # `encode_special_tokens` covers tokens marked special, so BOS and EOS must be.
        ordinary = [a for a in self._description.get("added_tokens") or [] if a["id"] in (bos_id, eos_id)]
        ordinary = [added for added in ordinary if not added["special"]]
        for added in ordinary:
            added["special"] = True
        self._tokenizer = _build_tokenizer(json.dumps(self._description) if ordinary else content.decode(), name)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._encoder = LibraryEncoder(self._description, self._tokenizer)

    def _encode_array(self, text: str) -> np.ndarray:
        return self._encoder(text)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token_num_bytes(self) -> np.ndarray:
        """UTF-8 bytes each id stands for, int64 [V]; 0 for special and unused ids."""
        byte_level = '"ByteLevel"' in json.dumps([self._description.get(k) for k in ("decoder", "pre_tokenizer")])
        num_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, token in self._tokenizer.get_vocab(with_added_tokens=False).items():
            num_bytes[token] = len(piece) if byte_level else _piece_num_bytes(piece)
        for added in self._description.get("added_tokens") or []:
            num_bytes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        num_bytes[[self.bos_id, self.eos_id]] = 0
        return num_bytes

    def _content(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._json_file}


def huggingface_from_files(path: Path, *, bos_token: str | None, eos_token: str | None) -> HuggingFaceTokenizer:
    """Tokenizer from a ``tokenizer.json``; BOS and EOS come from ``tokenizer_config.json`` beside it, if any.

    Raises:
        BitLMError: broken files, or BOS/EOS that cannot be told.
    """
    beside = path.with_name("tokenizer_config.json")
    try:
        content = path.read_bytes()
        settings = json.loads(beside.read_text()) if beside.is_file() else {}
    except (OSError, ValueError) as error:
        raise BitLMError(f"tokenizer {path}: cannot be read ({error})") from error
    configured = {key: _token_text(settings.get(key)) for key in ("bos_token", "eos_token")}
    return _huggingface(content, configured, bos_token, eos_token, str(path))


def huggingface_from_name(name: str, *, bos_token: str | None, eos_token: str | None) -> HuggingFaceTokenizer:
    """Tokenizer of a ``transformers`` folder without tokenizer.json, or of a hub name; never runs remote
    code.

    Raises:
        BitLMError: not found, not reachable, or BOS/EOS that cannot be told.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        content = loaded.backend_tokenizer.to_str().encode()
    except Exception as error:  # transformers raises many kinds here; each means the name is of no use
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BitLMError(f"tokenizer {name!r}: neither a file here nor loadable from the hub ({reason})") from error
    configured = {"bos_token": loaded.bos_token, "eos_token": loaded.eos_token}
    return _huggingface(content, configured, bos_token, eos_token, name)


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Byte-level BPE trained on texts; ``vocab_size`` includes BOS and EOS, which get ids 0 and 1.

    The same texts in the same order give the same tokenizer.

    Raises:
        BitLMError: fewer than 258 ids asked for, or more than the texts support.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise BitLMError(f"tokenizer train:bpe:{vocab_size}: at least 258 ids are needed (256 bytes, BOS, EOS)")
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[TRAINED_BOS, TRAINED_EOS],
    )
    library.train_from_iterator(texts, trainer=trainer)
    if library.get_vocab_size() != vocab_size:
        raise BitLMError(
            f"tokenizer train:bpe:{vocab_size}: the corpus supports only {library.get_vocab_size()} ids; "
            "ask for that many or give more text"
        )
    content = library.to_str().encode()
    return HuggingFaceTokenizer(content, library.token_to_id(TRAINED_BOS), library.token_to_id(TRAINED_EOS), "trained")


def _huggingface(
    content: bytes, configured: dict[str, str | None], bos_token: str | None, eos_token: str | None, name: str
) -> HuggingFaceTokenizer:
    description = _parse_tokenizer_json(content, name)
    new_tokens = [t.removeprefix("add:") for t in (bos_token, eos_token) if t is not None and t.startswith("add:")]
    if new_tokens:
        content = _with_added_tokens(description, new_tokens, name)
        description = _parse_tokenizer_json(content, name)
        bos_token, eos_token = (t and t.removeprefix("add:") for t in (bos_token, eos_token))
    vocab = _vocabulary(description)
    endoftext = "<|endoftext|>" if "<|endoftext|>" in vocab else None
    eos_id = _find_special(
        "eos_token", eos_token, [endoftext, configured["eos_token"], *_EOS_CANDIDATES], vocab, None, name
    )
    bos_candidates = [configured["bos_token"], *_BOS_CANDIDATES]
    bos_id = _find_special("bos_token", bos_token, bos_candidates, vocab, eos_id, name)
    return HuggingFaceTokenizer(content, bos_id, eos_id, name, description)


def _find_special(
    option: str,
    chosen: str | None,
    candidates: list[str | None],
    vocab: dict[str, int],
    taken: int | None,
    name: str,
) -> int:
    if chosen is not None:
        if chosen not in vocab:
            raise BitLMError(
                f"tokenizer {name}: {option} {chosen!r} is not in the vocabulary; `add:{chosen}` would add it"
            )
        return vocab[chosen]
    for candidate in candidates:
        if candidate is not None and candidate in vocab and vocab[candidate] != taken:
            return vocab[candidate]
    raise BitLMError(
        f"tokenizer {name}: no token to serve as {option.removesuffix('_token').upper()}; name one with "
        f"`{option}`, or let `{option}=add:TOKEN` add one"
    )


def _with_added_tokens(description: dict[str, Any], tokens: list[str], name: str) -> bytes:
    from tokenizers import AddedToken

    library = _build_tokenizer(json.dumps(description), name)
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return library.to_str().encode()


def _parse_tokenizer_json(content: bytes, name: str) -> dict[str, Any]:
    try:
        description = json.loads(content)
        if not isinstance(description, dict) or "vocab" not in (description.get("model") or ()):
            raise ValueError("no `model` with a `vocab` in it")
    except ValueError as error:
        raise BitLMError(f"tokenizer {name}: not a tokenizer.json ({error})") from error
    return description


def _vocabulary(description: dict[str, Any]) -> dict[str, int]:
    """Id of every token, the added ones included; a Unigram model lists its pieces in the order of their ids."""
    known = description["model"]["vocab"]
    vocab = dict(known) if isinstance(known, dict) else {piece: token for token, (piece, _) in enumerate(known)}
    return vocab | {added["content"]: added["id"] for added in description.get("added_tokens") or []}


def _build_tokenizer(content: str, name: str) -> Any:
    from tokenizers import Tokenizer as Library

    try:
        return Library.from_str(content)
    except Exception as error:  # the library raises bare Exception
        raise BitLMError(f"tokenizer {name}: not a tokenizer.json ({error})") from error


def _parse_ranks(content: bytes, name: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise BitLMError(f"tokenizer {name} line {number}: expected `base64 rank` ({error})") from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise BitLMError(f"tokenizer {name}: the ranks are not 0 ... n-1, each once")
    return ranks


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _piece_num_bytes(piece: str) -> int:
    """Bytes of a SentencePiece or WordPiece piece: ``<0xAB>`` is a byte and U+2581 a space."""
    if _BYTE_TOKEN.fullmatch(piece):
        return 1
    return len(piece.removeprefix("##").replace("\u2581", " ").encode())


def _check_specials(bos_id: int, eos_id: int, name: str) -> None:
    if bos_id == eos_id:
        raise BitLMError(
            f"tokenizer {name}: BOS and EOS are the same id {bos_id}; name others with bos_token, eos_token"
        )
