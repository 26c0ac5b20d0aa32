"""The loader's benchmark reads what it says it reads."""

import json

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_bitlm.benchmarks.datasets import write_sparse_dataset, write_sparse_int32_dataset
from megatron_bitlm.benchmarks.loader import LoaderBenchmark, Places, bench_loader, open_loader, watch_memory
from megatron_bitlm.data.indexed import open_dataset
from megatron_bitlm.errors import BitLMError

SMALL = {"num_documents": 500, "dataset_bytes": 300_000, "sequence_length": 64, "num_samples": 20, "device": "cpu"}


@pytest.fixture
def places(tmp_path):
    write_sparse_dataset(tmp_path / "ours", SMALL["num_documents"], SMALL["dataset_bytes"])
    write_sparse_int32_dataset(tmp_path / "theirs", tmp_path / "ours")
    return Places(str(tmp_path / "ours"), str(tmp_path / "theirs"))


def test_sparse_datasets_agree(places):
    ours, theirs = open_dataset(places.bitlm), IndexedDataset(places.megatron)
    assert len(ours) == len(theirs) == 500
    assert np.array_equal(ours.sequence_lengths * 4, theirs.sequence_lengths)
    assert ours.card.bin_num_bytes == pytest.approx(300_000, rel=0.2) and not ours.get(7).any()
    assert theirs.get(499).shape == (ours.sequence_lengths[499] * 4,)


def test_both_give_samples_of_the_length(places):
    settings = LoaderBenchmark(**SMALL, micro_batch_size=2)
    batch = next(open_loader(settings, places, "bitlm"))
    assert batch.packed.shape == (2, 64 // 4 + 1, 9)
    assert next(open_loader(settings, places, "megatron_gpt_dataset"))["tokens"].shape == (2, 64)


def test_memory_is_reported(places):
    found = watch_memory(LoaderBenchmark(**SMALL), places, "bitlm")
    assert len(found["resident_bytes"]) == 5 and min(found["resident_bytes"]) > 1e6 and found["open_seconds"] > 0


def test_report(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_bitlm.benchmarks.loader._watch", watch_memory)  # in this process: quick
    report = bench_loader(LoaderBenchmark(**SMALL, num_repetitions=2), tmp_path / "loader.json")
    assert json.loads((tmp_path / "loader.json").read_text()) == report
    assert report["baseline"] == "megatron_gpt_dataset" and list(report["variants"]) == [report["baseline"], "bitlm"]
    assert report["facts"]["num_documents"] == 500


def test_refused_settings():
    with pytest.raises(BitLMError, match="num_samples 20 is not a positive multiple of micro_batch_size 3"):
        bench_loader(LoaderBenchmark(**SMALL, micro_batch_size=3))
    with pytest.raises(BitLMError, match="too few for 500 documents"):
        bench_loader(LoaderBenchmark(**{**SMALL, "dataset_bytes": 9000}))
    with pytest.raises(BitLMError, match=r"nowhere.json: no such dataset card"):
        bench_loader(LoaderBenchmark(**SMALL, dataset="nowhere"))
