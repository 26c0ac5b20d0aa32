"""The attention benchmark measures what it says and writes what it prints."""

import json

import pytest
import torch

from megatron_bitlm.benchmarks.attention import AttentionBenchmark, bench_attention, build_call
from megatron_bitlm.cli import main
from megatron_bitlm.errors import BitLMError

SMALL = {"seq_len": 64, "head_dim": 8, "num_heads": 4, "num_kv_heads": 2, "num_repetitions": 3, "device": "cpu"}


@pytest.mark.parametrize("mean_document_tokens", [0, 12])
def test_report(tmp_path, capsys, mean_document_tokens):
    settings = AttentionBenchmark(**SMALL, batch_size=2, mean_document_tokens=mean_document_tokens)
    report = bench_attention(settings, tmp_path / "attention.json")
    assert json.loads((tmp_path / "attention.json").read_text()) == report
    variants = report["variants"]
    assert list(variants) == ["fast", "masked_sdpa", "causal_same_documents", "causal_sdpa"]
    assert report["baseline"] == "fast" and variants["fast"]["time_ratio"]["median"] == 1
    assert all(len(found["turns"]) == 3 for found in variants.values())
    assert (report["facts"]["num_documents"] == 2) == (mean_document_tokens == 0)
    printed = capsys.readouterr().out
    assert all(name in printed for name in variants)


def test_contestants_of_processes_of_their_own():
    """Alone in a process a contestant computes what it does beside the others."""
    settings = AttentionBenchmark(**SMALL, mean_document_tokens=12)
    fast, masked = (build_call(settings, name)() for name in ("fast", "masked_sdpa"))
    for one, other in zip(fast, masked, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_further_backends(capsys):
    settings = AttentionBenchmark(**SMALL, backends=["dense", "flash_attn3", "flex"])
    report = bench_attention(settings)
    assert list(report["variants"])[4:] == ["dense"]
    assert report["facts"]["left_out"].keys() == {"flash_attn3", "flex"}
    assert "flex left out: FlexAttention has no backward pass on a CPU" in capsys.readouterr().out


def test_command(tmp_path, capsys):
    output = tmp_path / "new" / "figures.json"
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    assert main(["bench", "attention", *flags, "--output", str(output)]) == 0
    assert json.loads(output.read_text())["settings"]["seq_len"] == 64
    assert main(["bench", "attention", *flags, "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_bad_settings_are_refused():
    for change, message in [
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"block_size": 5}, "whole number of blocks of 5"),
        ({"mean_document_tokens": 3}, "shorter than a block"),
        ({"num_repetitions": 0}, "num_repetitions"),
        ({"num_warmup": -1}, "num_warmup"),
        ({"backends": ["slow"]}, "unknown attention backend 'slow'"),
        ({"num_kv_heads": 3}, "4 heads cannot share 3"),
    ]:
        with pytest.raises(BitLMError, match=message):
            bench_attention(AttentionBenchmark(**{**SMALL, **change}))


@pytest.mark.gpu
def test_report_on_a_gpu():
    sizes = {"seq_len": 512, "num_heads": 4, "num_kv_heads": 2, "dtype": "bfloat16", "num_repetitions": 2}
    backends = ["flash", "flash_eager", "flash_attn2", "flash_attn3", "transformer_engine", "flex"]
    report = bench_attention(AttentionBenchmark(**sizes, mean_document_tokens=100, backends=backends, memory=True))
    assert set(backends) == (set(report["variants"]) | report["facts"]["left_out"].keys()) & set(backends)
    peaks = {name: found["peak_bytes"] for name, found in report["variants"].items()}
    assert peaks["masked_sdpa"] > peaks["fast"] > 512 * 4 * 64 * 2
