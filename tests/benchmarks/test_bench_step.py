"""The step benchmark trains the models it names, through the trainer's own session."""

import json

import numpy as np
import pytest
import torch

from megatron_bitlm.benchmarks.datasets import write_random_dataset
from megatron_bitlm.benchmarks.step import StepBenchmark, TimedStep, bench_step, build_call, run_config
from megatron_bitlm.data.card import load_dataset_code
from megatron_bitlm.data.indexed import open_dataset
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.parallel.state import initialize_parallel, shutdown_parallel

SMALL = {
    "preset": "tiny",
    "num_layers": 1,
    "vocab_size": 500,
    "sequence_length": 32,
    "micro_batch_size": 2,
    "num_repetitions": 2,
    "memory": False,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_report(tmp_path):
    report = bench_step(StepBenchmark(**SMALL, num_micro_batches=2, document_tokens=20), tmp_path / "step.json")
    assert json.loads((tmp_path / "step.json").read_text()) == report
    assert report["baseline"] == "softmax" and list(report["variants"]) == ["softmax", "bitlm"]
    facts = report["facts"]
    # Tied tables: V rows, padded, once.
    layers = facts["softmax"]["num_parameters"] - 512 * 192
    assert 0 < layers < facts["bitlm"]["num_parameters"]
    assert facts["softmax"]["flops_per_token"]["head"] == 6 * 500 * 192
    # Documents of 20 + BOS + EOS tokens are whole blocks of 28, which a row of 32 cuts; a sample as one would see 16.5.
    assert 8 < facts["softmax"]["mean_visible_keys"] < facts["bitlm"]["mean_visible_keys"] < 15
    if not torch.cuda.is_available():
        assert facts["bitlm"]["mfu"] is None
    found = report["variants"]["bitlm"]
    assert found["tokens_per_second"]["max"] == pytest.approx(2 * 2 * 32 / found["seconds"]["min"])


@pytest.mark.parametrize("name", ["softmax", "bitlm"])
def test_every_call_is_a_step(tmp_path, name):
    settings = StepBenchmark(**SMALL)
    prefix = tmp_path / "random"
    write_random_dataset(prefix, 2, 200, vocab_size=500, block_size=4)
    config = run_config(settings, name, prefix)
    try:
        step = TimedStep(config, initialize_parallel(config.parallel, seed=0))
        before = [p.detach().clone() for p in step.session.chunks[0].parameters()]
        losses = [step() for _ in range(30)]
        moved = [not torch.equal(a, b) for a, b in zip(before, step.session.chunks[0].parameters(), strict=True)]
        step.session.close()
    finally:
        shutdown_parallel()
    assert losses[-1] < losses[0] and np.mean(moved) > 0.9


def test_call_of_a_process_of_its_own(tmp_path):
    prefix = tmp_path / "random"
    write_random_dataset(prefix, 2, 200, vocab_size=500, block_size=4)
    try:
        assert build_call((StepBenchmark(**SMALL), prefix), "bitlm")() > 0
    finally:
        shutdown_parallel()


def test_random_dataset_is_read_as_one(tmp_path):
    card = write_random_dataset(tmp_path / "set", 3, 10, vocab_size=500, block_size=4)
    dataset, code = open_dataset(tmp_path / "set"), load_dataset_code(tmp_path / "set")
    ids = np.stack([code.unpack(dataset.get(number), 4).ravel() for number in range(3)])
    assert ids.shape == (3, 16) and (ids[:, :4] == card.bos_id).all() and (ids[:, 14:] == card.eos_id).all()
    assert len(set(ids[:, 4:14].ravel().tolist())) > 20 and card.num_text_tokens == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": ["lstm"]}, r"variants must be some of softmax, .* got \['lstm'\]"),
        ({"variants": []}, "variants must be some of"),
        ({"sequence_length": 30}, "sequence_length 30 is not divisible by model.block_size 4"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1"),
        ({"head_layers": 3}, "num_layers 3 is not divisible"),
        ({"variants": ["softmax", "softmax_fp8"], "precision": "fp32"}, "FP8 goes with bf16"),
    ],
)
def test_refused_settings(change, message):
    with pytest.raises(BitLMError, match=message):
        bench_step(StepBenchmark(**{**SMALL, **change}))
    assert not torch.distributed.is_initialized()


@pytest.mark.gpu
def test_report_on_a_gpu(tmp_path):
    settings = StepBenchmark(**{**SMALL, "sequence_length": 128, "memory": True})
    report = bench_step(settings, tmp_path / "step.json")
    found = report["variants"]["bitlm"]
    assert found["peak_bytes"] > 4 * report["facts"]["bitlm"]["num_parameters"]
    if report["facts"]["bitlm"]["peak_flops_per_second"]:
        assert 0 < report["facts"]["bitlm"]["mfu"] < 1


@pytest.mark.gpu
def test_fp8_step_on_a_gpu(tmp_path):
    pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    settings = StepBenchmark(**{**SMALL, "sequence_length": 128, "num_layers": 4, "variants": ["bitlm", "bitlm_fp8"]})
    report = bench_step(settings)
    assert report["variants"]["bitlm_fp8"]["seconds"]["median"] > 0
