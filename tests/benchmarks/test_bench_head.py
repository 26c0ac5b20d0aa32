"""The head's benchmark builds what it names."""

import json

import pytest

from megatron_bitlm.benchmarks.head import HeadBenchmark, bench_head, build_call, shapes
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.head import DiffusionHead

SMALL = {
    "device": "cpu",
    "hidden_size": 16,
    "num_tokens": 16,
    "vocab_size": 100,
    "num_repetitions": 2,
    "depths": [2],
    "memory": False,
}


def test_report(tmp_path):
    report = bench_head(HeadBenchmark(**SMALL), tmp_path / "head.json")
    assert json.loads((tmp_path / "head.json").read_text()) == report
    names = list(report["variants"])
    assert names[0] == report["baseline"] == "softmax" and len(names) == 1 + 3 * 2 * 2
    assert {"w4_l2_r1", "w8_l2_r4_recompute", "w16_l2_r4"} <= set(names)
    facts = report["facts"]
    assert facts["softmax"] == {"num_parameters": 1600, "flops_per_token": 9600}
    head = DiffusionHead(shapes(HeadBenchmark(**SMALL))[-1].config(), num_bits=7, block_size=4, condition_size=16)
    assert facts["w16_l2_r4"]["num_parameters"] == sum(p.numel() for p in head.parameters())
    # Four copies cost four times the head's own work; the condition is embedded once.
    assert 3.5 < facts["w16_l2_r4"]["flops_per_token"] / facts["w16_l2_r1"]["flops_per_token"] < 4


def test_recomputation_changes_no_gradient():
    settings = HeadBenchmark(**SMALL)
    plain, again = (build_call(settings, name)() for name in ("w16_l2_r4", "w16_l2_r4_recompute"))
    assert len(plain) == len(again) > 10
    for one, other in zip(plain, again, strict=True):
        assert (one is None and other is None) or one.equal(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 15}, "num_tokens 15 is not a multiple of block_size 4"),
        ({"width_divisors": [3]}, "3 does not divide hidden_size 16"),
        ({"depths": []}, "at least one value"),
        ({"depths": [3]}, "num_layers 3 is not divisible by num_modulation_groups 2"),
    ],
)
def test_refused_settings(change, message):
    with pytest.raises(BitLMError, match=message):
        bench_head(HeadBenchmark(**{**SMALL, **change}))


@pytest.mark.gpu
def test_report_on_a_gpu():
    sizes = {**SMALL, "device": "cuda", "hidden_size": 512, "num_tokens": 2048, "depths": [6], "memory": True}
    report = bench_head(HeadBenchmark(**sizes))
    assert report["settings"]["precision"] == "auto"
    peaks = {name: found["peak_bytes"] for name, found in report["variants"].items()}
    assert peaks["w512_l6_r4_recompute"] < peaks["w512_l6_r4"]
