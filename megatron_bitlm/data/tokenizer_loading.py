"""The tokenizer meant by a short name, a file, a folder or a hub name."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_bitlm.data import tokenizer_backends as backends
from megatron_bitlm.data.tokenizer import DESCRIPTION_FILE, BytesTokenizer, Tokenizer
from megatron_bitlm.errors import BitLMError


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
