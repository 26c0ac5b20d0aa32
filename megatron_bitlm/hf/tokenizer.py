"""A tokenizer as transformers' fast tokenizers have it: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from megatron_bitlm.data.tokenizer import Tokenizer
from megatron_bitlm.data.tokenizer_backends import TiktokenTokenizer
from megatron_bitlm.errors import BitLMError

_PROBE = "def f(x):\n    return x ** 2  # naïve café, 東京 1,234.5 don't\t\r\n\n  the end"
_BYTES_SPECIALS = {256: "<|im_start|>", 257: "<|endoftext|>"}


def write_hf_tokenizer(tokenizer: Tokenizer, saved: Path, folder: Path, max_length: int) -> str | None:
    """Write the tokenizer's files for `AutoTokenizer`, and check that they give the same ids.

    Args:
        tokenizer: To be written.
        saved: Folder that `Tokenizer.save` wrote.
        folder: Existing folder of the export.
        max_length: Tokens the model takes.

    Returns:
        None, or why there is no such file; the model then needs the ids from elsewhere.
    """
    if tokenizer.kind == "sentencepiece":
        return (
            "a SentencePiece model has no exact tokenizer.json; use bitlm_tokenizer/tokenizer.model with sentencepiece"
        )
    library = _library(tokenizer, saved)
    if library.encode(_PROBE, add_special_tokens=False).ids != tokenizer.encode(_PROBE):
        raise BitLMError(f"tokenizer {saved}: its tokenizer.json would give other ids than it does; it is not exported")
    library.save(str(folder / "tokenizer.json"))
    bos, eos = (library.id_to_token(token) for token in (tokenizer.bos_id, tokenizer.eos_id))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return None


def _library(tokenizer: Tokenizer, saved: Path) -> Library:
    if tokenizer.kind == "bytes":
        return _byte_level(
            {bytes([value]): value for value in range(256)},
            [],
            _BYTES_SPECIALS,
            pre_tokenizers.ByteLevel(False, False, False),
        )
    if isinstance(tokenizer, TiktokenTokenizer):
        ranks = tokenizer.ranks
        specials = {tokenizer.eos_id: "<|endoftext|>", tokenizer.bos_id: "<|im_start|>"}
        split = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return _byte_level(ranks, _merges(ranks), specials, split)
    return Library.from_file(str(saved / "tokenizer.json"))


def _byte_level(
    ranks: Mapping[bytes, int], merges: list[tuple[bytes, bytes]], specials: dict[int, str], split: Any
) -> Library:
    spell = _spelling()
    vocab = {spell(token): rank for token, rank in ranks.items()}
    library = Library(models.BPE(vocab, [(spell(a), spell(b)) for a, b in merges], ignore_merges=True))
    library.pre_tokenizer = split
    library.decoder = decoders.ByteLevel()
    for expected, text in sorted(specials.items()):
        library.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        if library.token_to_id(text) != expected:
            raise BitLMError(f"tokenizer: {text} would get id {library.token_to_id(text)} instead of {expected}")
    return library


def _spelling() -> Any:
    """Bytes as the letters that byte-level BPE files write for them (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (value for value in range(256) if value not in plain)
    table = {value: chr(value) for value in plain} | {value: chr(256 + number) for number, value in enumerate(others)}
    return lambda token: "".join(table[value] for value in token)


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token: the two parts that merging by the lower ranks leaves of its bytes."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [bytes([value]) for value in token]
        while len(parts) > 2:
            pairs = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
            best, place = min(pairs)
            if best >= rank:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges
