"""Preprocessing timed against the recipe of Megatron-LM's preprocess_data.py, on the same text, one process each.

The recipe, written anew: every line is parsed as JSON, encoded by one call of the `tokenizers` library, closed with an
end-of-document id, and handed as a list to megatron-core's `IndexedDatasetBuilder` of int32. The original sends each
document through a pool of processes, also where it has one worker; that cost is left out here, in the recipe's favour.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_bitlm.benchmarks.harness import BenchmarkConfig, Comparison, take_turns
from megatron_bitlm.benchmarks.report import check_output, describe_device, make_report, publish
from megatron_bitlm.data.installed_docs import MAX_NUM_BYTES, installed_docs
from megatron_bitlm.data.preprocess import PreprocessConfig, preprocess
from megatron_bitlm.errors import BitLMError

_RECIPE, _OURS, _OURS_BY_RANKS = "megatron_recipe", "bitlm", "bitlm_ranks"


@dataclass(kw_only=True)
class PreprocessBenchmark(BenchmarkConfig):
    """Text to dataset in one process; everything counts, from reading the tokenizer to closing the files.

    Attributes:
        tokenizer: A tokenizer.json, for example Qwen3's; both sides read it.
        ranks: A .tiktoken file of the same vocabulary, for a third variant.
        input: A JSONL file with the key `text`; by default the documentation of the installed Python packages.
        max_num_bytes: UTF-8 bytes of documentation to take.
        block_size: m.
        num_repetitions: Turns that are counted.
    """

    tokenizer: str = "tokenizer.json"
    ranks: str | None = None
    input: str | None = None
    max_num_bytes: int = MAX_NUM_BYTES
    block_size: int = 4
    num_repetitions: int = 3


@dataclass
class Outcome:
    """What one call made: documents, tokens without and with those that frame documents, bytes of the .bin and .idx."""

    num_documents: int
    num_text_tokens: int
    num_stored_tokens: int
    bin_bytes: int
    idx_bytes: int

    def facts(self) -> dict[str, float]:
        """These, what a stored token takes, and what a token of text takes with framing and index."""
        num_bytes = self.bin_bytes + self.idx_bytes
        return {
            **vars(self),
            "bytes_per_stored_token": self.bin_bytes / max(self.num_stored_tokens, 1),
            "disk_bytes_per_text_token": num_bytes / max(self.num_text_tokens, 1),
        }


def bench_preprocess(settings: PreprocessBenchmark, output: Path | None = None) -> dict[str, Any]:
    """Times the ways from text to dataset, prints a table and returns the figures (also as JSON in ``output``).

    Raises:
        BitLMError: A tokenizer or input that cannot be read, or an ``output`` that exists.
    """
    check_output(output)
    settings.validate()
    for name, value in {"tokenizer": settings.tokenizer, "ranks": settings.ranks, "input": settings.input}.items():
        if value is not None and not Path(value).is_file():
            hint = "; give a tokenizer.json, for example from the folder of a Qwen3 model" * (name == "tokenizer")
            raise BitLMError(f"{name} {value}: no such file{hint}")
    if not settings.tokenizer.endswith(".json"):
        raise BitLMError(f"tokenizer {settings.tokenizer}: the recipe needs a tokenizer.json")
    device = settings.torch_device()
    machine = describe_device(device)
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="bitlm-bench-") as folder:
        corpus = Path(settings.input) if settings.input else _write_docs(Path(folder), settings.max_num_bytes)
        variants = _variants(settings, corpus, Path(folder), outcomes)
        turns = take_turns(variants, settings, device)
        with open(corpus, encoding="utf-8") as stream:
            num_text_bytes = float(sum(len(json.loads(line)["text"].encode()) for line in stream))
    comparison = Comparison(_RECIPE, turns, dict.fromkeys(variants, num_text_bytes), "bytes")
    facts = {"num_text_bytes": num_text_bytes, "datasets": {name: found.facts() for name, found in outcomes.items()}}
    lines = [
        f"preprocessing of {num_text_bytes / 1e6:.1f} MB of text in one process, {settings.tokenizer}",
        comparison.table(),
        *(
            f"{name}: {found.num_documents:,} documents, {found.num_text_tokens:,} tokens, "
            f"{found.facts()['bytes_per_stored_token']:.3f} bytes a stored token; with framing and index "
            f"{found.facts()['disk_bytes_per_text_token']:.3f} a token of text"
            for name, found in outcomes.items()
        ),
    ]
    return publish(make_report("preprocess", settings, machine, comparison, facts), "\n".join(lines), output)


def megatron_recipe(corpus: Path, tokenizer_json: Path, prefix: Path) -> Outcome:
    """JSONL to Megatron's own int32 dataset PREFIX.bin and PREFIX.idx, a document at a time."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    end = tokenizer.get_vocab_size(with_added_tokens=True)  # any id of no token will do
    builder = IndexedDatasetBuilder(f"{prefix}.bin")
    num_documents = num_tokens = 0
    with open(corpus, encoding="utf-8") as stream:
        for line in stream:
            ids = tokenizer.encode(json.loads(line)["text"]).ids
            if ids:
                num_documents, num_tokens = num_documents + 1, num_tokens + len(ids)
                ids.append(end)
                builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    sizes = (Path(f"{prefix}{suffix}").stat().st_size for suffix in (".bin", ".idx"))
    return Outcome(num_documents, num_tokens, num_tokens + num_documents, *sizes)


def bitlm_preprocess(corpus: Path, tokenizer: str, block_size: int, prefix: Path) -> Outcome:
    """JSONL to packed codes, as `bitlm preprocess --num_workers 1` makes them."""
    config = PreprocessConfig(
        output=str(prefix), tokenizer=tokenizer, input=[str(corpus)], block_size=block_size, num_workers=1
    )
    with contextlib.redirect_stderr(io.StringIO()):  # the progress display
        card = preprocess(config)
    stored = card.num_blocks * block_size
    return Outcome(card.num_documents, card.num_text_tokens, stored, card.bin_num_bytes, card.idx_num_bytes)


def _variants(
    settings: PreprocessBenchmark, corpus: Path, folder: Path, outcomes: dict[str, Outcome]
) -> dict[str, Callable[[], object]]:
    """Calls that each write to a new folder, remove it, and leave their outcome in ``outcomes``."""

    def in_new_folder(name: str, make: Callable[[Path], Outcome]) -> Callable[[], object]:
        def run() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                outcomes[name] = make(Path(place) / "set")

        return run

    def ours(tokenizer: str) -> Callable[[Path], Outcome]:
        return lambda prefix: bitlm_preprocess(corpus, tokenizer, settings.block_size, prefix)

    variants = {
        _RECIPE: in_new_folder(_RECIPE, lambda prefix: megatron_recipe(corpus, Path(settings.tokenizer), prefix)),
        _OURS: in_new_folder(_OURS, ours(settings.tokenizer)),
    }
    if settings.ranks is not None:
        variants[_OURS_BY_RANKS] = in_new_folder(_OURS_BY_RANKS, ours(settings.ranks))
    return variants


def _write_docs(folder: Path, max_num_bytes: int) -> Path:
    path = folder / "docs.jsonl"
    texts = installed_docs(max_num_bytes=max_num_bytes)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path
