"""The attention benchmark measures what it says and writes what it prints."""

import json

import pytest

from megatron_bitlm.benchmarks.attention import AttentionBenchmark, bench_attention
from megatron_bitlm.errors import BitLMError

SMALL = {"seq_len": 64, "head_dim": 8, "num_heads": 4, "num_kv_heads": 2, "num_repetitions": 3}


@pytest.mark.parametrize("mean_document_tokens", [0, 12])
def test_report(tmp_path, capsys, mean_document_tokens):
    settings = AttentionBenchmark(**SMALL, batch_size=2, mean_document_tokens=mean_document_tokens)
    report = bench_attention(settings, tmp_path / "attention.json")
    assert json.loads((tmp_path / "attention.json").read_text()) == report
    timings = report["timings"]
    assert list(timings) == ["fast", "masked_sdpa", "causal_same_documents", "causal_sdpa"]
    assert timings["fast"]["ratio_to_fast"] == 1
    assert all(len(t["milliseconds"]) == 3 and t["min_ms"] <= t["median_ms"] <= t["max_ms"] for t in timings.values())
    assert (report["num_documents"] == 2) == (mean_document_tokens == 0)
    printed = capsys.readouterr().out
    assert all(name in printed for name in timings)


def test_bad_settings_are_refused(tmp_path):
    taken = tmp_path / "taken.json"
    taken.write_text("{}")
    with pytest.raises(BitLMError, match="taken.json exists"):
        bench_attention(AttentionBenchmark(**SMALL), taken)
    for change, message in [
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"block_size": 5}, "whole number of blocks of 5"),
        ({"mean_document_tokens": 3}, "shorter than a block"),
        ({"num_repetitions": 0}, "num_repetitions"),
        ({"num_kv_heads": 3}, "4 heads cannot share 3"),
    ]:
        with pytest.raises(BitLMError, match=message):
            bench_attention(AttentionBenchmark(**{**SMALL, **change}))
