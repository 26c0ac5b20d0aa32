"""tiktoken in place of the `tokenizers` library where both give the same ids, four times as fast.

Both merge the adjacent pair of lowest rank, the leftmost of equals. They differ in what a pair is: to tiktoken any two
pieces whose bytes together are a token, to `tokenizers` only the pair that the file's merges name. With one merge a
token, in the order of the ids, these are the same wherever every token, encoded alone, comes out as itself. For then
let two adjacent pieces a, b spell token T: no merge has crossed T's ends, so the merges inside it went as they go in T
alone, and the only two pieces on that way are those of T's own merge. All of this is checked when a file is loaded,
and a tokenizer that fails any of it is left to its own library.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_bitlm.data.split_patterns import SPLIT_PATTERNS

# Expressions that files of the `tokenizers` library spell as tiktoken does; checked over all of Unicode (Qwen's).
_KNOWN_PATTERNS = frozenset({SPLIT_PATTERNS["qwen"], SPLIT_PATTERNS["cl100k"]})
# tiktoken's regex engine overflows its stack on some runs of a million white-space characters.
MAX_SPACE_RUN = 1 << 16
NUM_CHARS_WORTH_SPEED = 1 << 18
_LONG_SPACE_RUN = re.compile(rf"\s{{{MAX_SPACE_RUN}}}")
_PLAIN_BPE = {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
_PROBE_STRIDE, _PROBE_END = 13, 0x30000
_PROBE_CONTEXTS = ("a{0}b ", "{0} {0}\n", "1{0}'s ")

TextEncoder = Callable[[str], np.ndarray]


def has_long_space_run(text: str) -> bool:
    """Whether a text has a run of white space that tiktoken might not survive."""
    return len(text) >= MAX_SPACE_RUN and _LONG_SPACE_RUN.search(text) is not None


class LibraryEncoder:
    """Ids of texts by `tokenizers`, and by tiktoken once so much text has come that making sure of it is worth while.

    That takes about a second for 150,000 tokens.

    Args:
        description: The parsed tokenizer.json.
        library: The `tokenizers` object of it, with special tokens encoded as plain text.
    """

    def __init__(self, description: dict[str, Any], library: Any) -> None:
        self._description, self._library = description, library
        self._num_chars_left = NUM_CHARS_WORTH_SPEED
        self._fast: TextEncoder | None = None

    def __call__(self, text: str) -> np.ndarray:
        """Ids of one text, integers [n]."""
        if self._num_chars_left > 0:
            self._num_chars_left -= len(text)
            if self._num_chars_left <= 0:
                self._fast = fast_encoder(self._description, self._library)
        return self._fast(text) if self._fast is not None else library_ids(self._library, text)


def library_ids(library: Any, text: str) -> np.ndarray:
    """Ids of a text by `tokenizers`, int64 [n]."""
    return np.asarray(library.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def fast_encoder(description: dict[str, Any], library: Any) -> TextEncoder | None:
    """An encoder by tiktoken that gives the library's ids, or None where that is not certain; arguments as above."""
    pattern = _split_pattern(description.get("pre_tokenizer"))
    ranks = _ranks(description["model"])
    normalizes = description.get("normalizer") is not None
    if pattern is None or ranks is None or (normalizes and description["normalizer"].get("type") != "NFC"):
        return None
    if not _all_reachable(library.model, description["model"]["merges"]):
        return None
    import tiktoken

    encoding = tiktoken.Encoding(name="byte_pairs", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    added = [re.escape(token["content"]) for token in description.get("added_tokens") or [] if not token["special"]]
    find_added = re.compile("|".join(added)).search if added else None

    def encode(text: str) -> np.ndarray:
        normal = text if not normalizes or text.isascii() else library.normalizer.normalize_str(text)
        if has_long_space_run(text) or (find_added and (find_added(text) or find_added(normal))):
            return library_ids(library, text)
        return encoding.encode_to_numpy(normal, disallowed_special=())

    return encode if all(np.array_equal(encode(text), library_ids(library, text)) for text in _probes()) else None


def _split_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The regular expression that splits text before merging; None where it is not one of the known ones."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return SPLIT_PATTERNS["gpt2"]
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if pattern in _KNOWN_PATTERNS:
            return pattern
    return None


def _ranks(model: dict[str, Any]) -> dict[bytes, int] | None:
    """Bytes of every token and its id; None unless all bytes are there and merges make the others in order of id."""
    if model.get("type") != "BPE" or any(model.get(key, value) != value for key, value in _PLAIN_BPE.items()):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    vocab, octets = model["vocab"], _octets_of_characters()
    pieces = _merged_pieces(model["merges"])
    made = [vocab.get(piece, -1) for piece in pieces]
    in_order = all(first < second for first, second in zip([-1, *made], made, strict=False))
    if not in_order or not octets.keys() <= vocab.keys() or not set("".join(pieces)) <= octets.keys():
        return None
    # Whatever else is in the vocabulary (BOS and EOS of a trained tokenizer) no merge can make.
    return {bytes(octets[character] for character in piece): vocab[piece] for piece in [*octets, *pieces]}


def _merged_pieces(merges: list[Any]) -> list[str]:
    """What each merge makes; a file has them as pairs, or as two pieces with a space between."""
    return [merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in merges]


def _all_reachable(model: Any, merges: list[Any]) -> bool:
    """Whether every token, encoded alone, comes out as itself."""
    return all(len(model.tokenize(piece)) == 1 for piece in _merged_pieces(merges))


def _octets_of_characters() -> dict[str, int]:
    """The bytes that GPT-2's printable characters stand for: printable Latin-1 is itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [octet for octet in range(256) if octet not in printable]
    return {chr(octet): octet for octet in printable} | {chr(0x100 + i): octet for i, octet in enumerate(others)}


def _probes() -> list[str]:
    """Characters from all over Unicode between letters, digits and spaces: the two regex engines must agree on them."""
    characters = [chr(point) for point in range(0, _PROBE_END, _PROBE_STRIDE) if not 0xD800 <= point < 0xE000]
    return ["".join(context.format(character) for character in characters) for context in _PROBE_CONTEXTS]
