"""The decoding benchmark decodes what it says, with one backbone for all."""

import json

import pytest
import torch

from megatron_bitlm.benchmarks.decode import DecodeBenchmark, bench_decode, build_variants
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.parallel.state import ParallelConfig, initialize_parallel, shutdown_parallel

SMALL = {
    "preset": "tiny",
    "num_layers": 1,
    "vocab_size": 500,
    "num_steps": 4,
    "early_exit_evaluations": 2,
    "prompt_tokens": 6,
    "num_tokens": 8,
    "num_repetitions": 2,
}
NAMES = ["softmax", "w48", "w48_unguided", "w48_exit2", "w192", "w192_unguided", "w192_exit2"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_report(tmp_path, batch_size):
    report = bench_decode(DecodeBenchmark(**SMALL, batch_size=batch_size), tmp_path / "decode.json")
    assert json.loads((tmp_path / "decode.json").read_text()) == report
    assert report["baseline"] == "softmax" and list(report["variants"]) == NAMES
    for name in NAMES:
        found, shares = report["variants"][name], report["facts"][name]
        assert found["tokens_per_second"]["max"] == pytest.approx(batch_size * 8 / found["seconds"]["min"])
        assert 0 < shares["backbone"] < 1 and 0 < shares["output"] < 1 and sum(shares.values()) < 1


def test_variants_share_a_backbone_and_every_call_decodes_what_it_should():
    settings = DecodeBenchmark(**SMALL, batch_size=2)
    state = initialize_parallel(ParallelConfig(), seed=0)
    try:
        variants = build_variants(settings, state)
        first = next(variants["softmax"].decoder.model.decoder.parameters())
        rows = {}
        for name, variant in variants.items():
            assert next(variant.decoder.model.decoder.parameters()).data_ptr() == first.data_ptr()
            rows[name] = variant.engine.rows[0]
            before = rows[name].result.num_evaluations, rows[name].result.num_blocks
            assert [variant() for _ in range(4)] == [8] * 4 and variant.num_calls_left == 0
            assert len(variant.engine.rows) == 2  # none has ended
            evaluations, blocks = rows[name].result.num_evaluations, rows[name].result.num_blocks
            expected = 0 if name == "softmax" else 2 if "exit" in name else 4
            assert evaluations - before[0] == expected * (blocks - before[1])
    finally:
        shutdown_parallel()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_tokens": 6}, "num_tokens 6 is not a multiple of block_size 4"),
        ({"width_divisors": [5]}, "5 does not divide the width 192"),
        ({"early_exit_evaluations": 9}, "early_exit_evaluations .* got 9"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, words, tmp_path):
    with pytest.raises(BitLMError, match=words):
        bench_decode(DecodeBenchmark(**SMALL | settings), tmp_path / "decode.json")
    assert not (tmp_path / "decode.json").exists() and not torch.distributed.is_initialized()
