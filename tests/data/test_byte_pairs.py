"""tiktoken stands in for the tokenizers library only where both give the same ids."""

import base64
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from megatron_bitlm.data.byte_pairs import MAX_SPACE_RUN, NUM_CHARS_WORTH_SPEED, fast_encoder
from megatron_bitlm.data.tokenizer_backends import train_bpe
from megatron_bitlm.data.tokenizer_loading import load_tokenizer
from megatron_bitlm.errors import BitLMError

NUM_RANKS = 4000
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def shown(octets: bytes) -> str:
    """Bytes in GPT-2's characters, by the tokenizers library's own account."""
    pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizer.alphabet())
    printable = [c for c in alphabet if ord(c) < 256]
    others = iter(c for c in alphabet if ord(c) >= 256)
    table = {o: chr(o) if chr(o) in printable else next(others) for o in range(256)}
    return "".join(table[octet] for octet in octets)


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two pieces that merging by rank leaves of a token when only its own merge is missing."""
    parts = [bytes([octet]) for octet in token]
    while len(parts) > 2:
        candidates = [ranks.get(a + b, ranks[token]) for a, b in itertools.pairwise(parts)]
        place = int(np.argmin(candidates))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


@pytest.fixture(scope="module")
def description(qwen_ranks):
    """A tokenizer.json as published for Qwen, with its first 4,000 ranks."""
    lines = Path(qwen_ranks).read_text().splitlines()[:NUM_RANKS]
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    merges = [[shown(part) for part in last_merge(token, ranks)] for token in ranks if len(token) > 1]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    names = {"<|endoftext|>": True, "<|im_start|>": True, "<think>": False, "</think>": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {shown(token): rank for token, rank in ranks.items()},
            "merges": merges,
            **{"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
            **{"continuing_subword_prefix": "", "end_of_word_suffix": ""},
        },
        "added_tokens": [
            {"id": NUM_RANKS + i, "content": name, "special": special, **flags}
            for i, (name, special) in enumerate(names.items())
        ],
    }


def library_of(description):
    library = tokenizers.Tokenizer.from_str(json.dumps(description))
    library.encode_special_tokens = True
    return library


@pytest.fixture(scope="module")
def pair(description):
    library = library_of(description)
    encode = fast_encoder(description, library)
    assert encode is not None
    return encode, lambda text: library.encode(text, add_special_tokens=False).ids


def check(pair, text):
    assert pair[0](text).tolist() == pair[1](text)


def test_awkward_texts(pair, texts):
    for text in [*texts, "", "<|endoftext|> is text", "<think>\u0338 no </think>", "a" * 10_000, " " * MAX_SPACE_RUN]:
        check(pair, text)


@given(
    pieces=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
        | st.text("aeinrst 'l.\n\r\t0", max_size=30)
        | st.sampled_from(["<think>", "<|endoftext|>", "e\u0301", "\u212b", "'S", "\u017f", " \u3000"]),
        max_size=8,
    )
)
def test_any_text(pair, pieces):
    check(pair, "".join(pieces))


def test_every_hundredth_character_of_unicode(pair):
    for first in range(0, 100, 50):
        characters = [chr(point) for point in range(first, 0x110000, 100) if not 0xD800 <= point < 0xE000]
        check(pair, "\n".join(f"a{c}b '{c} s{c}1{c} {c}\r\n" for c in characters))


def test_trained_tokenizers_are_fast_too(texts):
    trained = train_bpe(texts * 3, 400)
    description = json.loads(trained._content()["tokenizer.json"])
    library = library_of(description)
    encode = fast_encoder(description, library)
    assert encode is not None
    for text in texts:
        assert encode(text).tolist() == library.encode(text, add_special_tokens=False).ids


def test_much_text_changes_engine_and_no_id(description, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(description))
    tokenizer = load_tokenizer(path)
    text = "It's the naïve <think> 123.\n"
    before = tokenizer.encode(text)
    assert tokenizer._encoder._fast is None
    tokenizer.encode("word " * (NUM_CHARS_WORTH_SPEED // 5))
    assert tokenizer._encoder._fast is not None and tokenizer.encode(text) == before
    assert tokenizer.encode("<|endoftext|>" * 9) == library_of(description).encode("<|endoftext|>" * 9).ids


def changed(description, **changes):
    return {**description, **changes}


def changed_model(description, **changes):
    return {**description, "model": {**description["model"], **changes}}


def test_what_could_differ_is_left_to_the_library(description):
    merges = description["model"]["merges"]
    split = json.loads(json.dumps(description["pre_tokenizer"]).replace("|'ve", ""))
    for other in [
        changed_model(description, dropout=0.1),
        changed_model(description, ignore_merges=True),
        changed_model(description, merges=[merges[1], merges[0], *merges[2:]]),
        changed(description, pre_tokenizer=split),
        changed(description, normalizer={"type": "NFKC"}),
    ]:
        assert fast_encoder(other, library_of(other)) is None
    words = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
    assert fast_encoder(changed(description, model=words), library_of(changed(description, model=words))) is None


def test_token_that_merging_cannot_reach(description):
    """a+b comes before b+c, so `a, bc` is never met in "abc"; tiktoken would join `ab` and `c` all the same."""
    octets = {piece: token for piece, token in description["model"]["vocab"].items() if len(piece) == 1}
    vocab = {**octets, "qz": 256, "zj": 257, "qzj": 258}
    merges = [["q", "z"], ["z", "j"], ["q", "zj"]]
    other = changed_model(description, vocab=vocab, merges=merges)
    library = library_of(other)
    assert library.encode("qzj", add_special_tokens=False).tokens == ["qz", "j"]
    assert fast_encoder(other, library) is None


def test_space_runs_that_tiktoken_may_not_survive(qwen_ranks):
    ranks = load_tokenizer(qwen_ranks)
    assert len(ranks.encode("a" + " " * (MAX_SPACE_RUN - 1) + "b")) > 2
    with pytest.raises(BitLMError, match=f"{MAX_SPACE_RUN} or more white-space characters in a row"):
        ranks.encode("a" + " " * MAX_SPACE_RUN)
