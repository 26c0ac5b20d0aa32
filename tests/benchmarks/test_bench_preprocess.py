"""The preprocessing benchmark compares ways that keep the same ids."""

import json

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_bitlm.benchmarks.preprocess import (
    PreprocessBenchmark,
    bench_preprocess,
    bitlm_preprocess,
    megatron_recipe,
)
from megatron_bitlm.data.card import load_dataset_code
from megatron_bitlm.data.framing import unframe
from megatron_bitlm.data.indexed import open_dataset
from megatron_bitlm.data.tokenizer_backends import train_bpe
from megatron_bitlm.errors import BitLMError

TEXTS = [f"the {word} fox jumps over {number} lazy dogs\n" * 3 for number, word in enumerate(["quick", "brown"] * 30)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with docs.jsonl and tokenizer.json."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_bpe(TEXTS, 300).save(folder)
    return folder


def test_both_ways_keep_the_same_ids(place, tmp_path):
    theirs = megatron_recipe(place / "docs.jsonl", place / "tokenizer.json", tmp_path / "theirs")
    ours = bitlm_preprocess(place / "docs.jsonl", str(place / "tokenizer.json"), 4, tmp_path / "ours")
    assert theirs.num_documents == ours.num_documents == len(TEXTS)
    assert theirs.num_text_tokens == ours.num_text_tokens
    reference, dataset = IndexedDataset(str(tmp_path / "theirs")), open_dataset(tmp_path / "ours")
    code, card = load_dataset_code(tmp_path / "ours"), dataset.card
    for number in range(len(TEXTS)):
        ids = code.unpack(dataset.get(number), 4).ravel()
        ids = unframe(ids, block_size=4, bos_id=card.bos_id, eos_id=card.eos_id)
        assert ids.tolist() == reference[number][:-1].tolist()
    assert ours.facts()["bytes_per_stored_token"] == pytest.approx(4 * 9 / 8 / 4, rel=0.05)  # 9 bits, byte-aligned runs
    assert theirs.facts()["bytes_per_stored_token"] == 4


def test_report(place, tmp_path):
    output = tmp_path / "figures.json"
    settings = PreprocessBenchmark(
        tokenizer=str(place / "tokenizer.json"), input=str(place / "docs.jsonl"), num_repetitions=2, num_warmup=0
    )
    report = bench_preprocess(settings, output)
    assert json.loads(output.read_text()) == report
    assert report["baseline"] == "megatron_recipe" and list(report["variants"]) == ["megatron_recipe", "bitlm"]
    assert report["facts"]["num_text_bytes"] == sum(map(len, TEXTS))
    assert report["facts"]["datasets"]["bitlm"]["num_documents"] == len(TEXTS)


def test_missing_files_are_named(place):
    with pytest.raises(BitLMError, match=r"tokenizer nowhere.json: no such file"):
        bench_preprocess(PreprocessBenchmark(tokenizer="nowhere.json"))
    with pytest.raises(BitLMError, match=r"docs.jsonl: the recipe needs a tokenizer.json"):
        bench_preprocess(PreprocessBenchmark(tokenizer=str(place / "docs.jsonl")))
