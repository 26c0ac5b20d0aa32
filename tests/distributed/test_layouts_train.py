"""Every layout trains the run that one process trains: losses, gradient norms, validation, and the checkpoint.

These are whole runs of the real entry point in fp32, five optimiser steps each; `tests/parallel` compares single
gradients of the backbone in float64.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_bitlm.hf.export import export
from megatron_bitlm.inference.generate import Generator
from megatron_bitlm.inference.load import loaded_model
from megatron_bitlm.method.sampler import SamplerConfig
from megatron_bitlm.model.layout import SequenceLayout
from megatron_bitlm.training.trainer import pretrain
from tests.distributed.train_run import run_all
from tests.distributed_harness import free_port, run_ranks
from tests.training_runs import corpus, make_dataset, read_metrics, run_config

NUM_STEPS = 5
COMMON = {
    "training__num_steps": NUM_STEPS,
    "optimizer__warmup_steps": 1,
    "optimizer__clip_grad": 0.05,
    "optimizer__head_learning_rate_multiplier": 0.5,
    "objective": {"samples_per_block": 2, "bit_flip_probability": 0.1},
    "training__micro_batch_size": 2,
    "validation__interval_steps": 2,
    "validation__num_samples": 24,
    "validation__num_repeats": 2,
}
TENSOR, PIPELINE = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
# test_layout_matrix.py has them all; these also write checkpoints and validate in between.
TWO_RANKS = {
    "TP2 SP": {TENSOR: 2, "parallel__sequence_parallel": True},
    "PP2": {PIPELINE: 2},
    "DP2 overlapped": {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True},
}
FOUR_RANKS = {"TP2 PP2 SP": {TENSOR: 2, PIPELINE: 2, "parallel__sequence_parallel": True}}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), "docs", corpus())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, prefix):
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("one") / "run"
    pretrain(run_config(directory, prefix, **COMMON))
    return directory


def run(folder, prefix, layouts, world_size):
    configs = {name: run_config(folder / name.replace(" ", "_"), prefix, **COMMON, **layouts[name]) for name in layouts}
    outcomes = run_ranks(run_all, world_size, [free_port() for _ in layouts], list(configs.values()), timeout_s=240)
    for of_rank in outcomes:  # every rank knows the outcome
        assert [o.validation.estimate for o in of_rank] == [o.validation.estimate for o in outcomes[0]]
        assert all(o.finished and o.step == NUM_STEPS for o in of_rank)
    return {name: folder / name.replace(" ", "_") for name in layouts}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, prefix):
    return run(tmp_path_factory.mktemp("two"), prefix, TWO_RANKS, 2)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory, prefix):
    return run(tmp_path_factory.mktemp("four"), prefix, FOUR_RANKS, 4)


def check(directory, one_process):
    ours, theirs = read_metrics(directory), read_metrics(one_process)
    assert len(ours) == len(theirs) == NUM_STEPS
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.keys() == expected.keys()
        for name, value in expected.items():
            tolerance = 1e-6 if name in ("loss", "validation/nats_per_token") else 1e-5
            assert mine[name] == pytest.approx(value, rel=tolerance, abs=1e-9), f"step {expected['step']}: {name}"
    assert any("validation/nats_per_token" in record for record in ours[:-1])


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_train_what_one_does(name, two_ranks, one_process):
    check(two_ranks[name], one_process)


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks_train_what_one_does(name, four_ranks, one_process):
    check(four_ranks[name], one_process)


@pytest.mark.parametrize("name", TWO_RANKS)
def test_one_process_reads_the_checkpoint_of_two(name, two_ranks, one_process):
    with loaded_model(one_process) as loaded:
        expected = {key: value.clone() for key, value in loaded.model.state_dict().items() if torch.is_tensor(value)}
    with loaded_model(two_ranks[name]) as loaded:
        found = {key: value for key, value in loaded.model.state_dict().items() if torch.is_tensor(value)}
    assert found.keys() == expected.keys() and len(found) > 40
    for key, value in expected.items():
        # The bias of the keys shifts all scores alike: its gradient is rounding, and Adam makes whole steps of that.
        bound = 2 * NUM_STEPS * 1e-3 if key.endswith("qkv.bias") else 2e-5
        assert (found[key] - value).abs().max() < bound, key


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_the_export_of_four_ranks_computes_the_same(name, four_ranks, tmp_path):
    folder = export(four_ranks[name], tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.randint(0, 256, (3, 32), generator=torch.Generator().manual_seed(0))
    prompts, seeds = [[1, 2, 3], list(b"abcdefgh")], [7, 8]
    with loaded_model(four_ranks[name]) as loaded, torch.no_grad():
        layout = SequenceLayout.from_batch(None, 3, 32, 4)
        states = loaded.model.states(loaded.code.encode(ids), layout).transpose(0, 1)
        torch.testing.assert_close(exported(ids).last_hidden_state, states, rtol=0, atol=1e-5)
        sampler = SamplerConfig(guidance=2.0)
        generator = Generator(loaded.model, loaded.code, bos_id=loaded.bos_id, eos_id=loaded.eos_id, sampler=sampler)
        expected = [row.ids for row in generator.generate(prompts, max_new_tokens=8, seeds=seeds)]
    for prompt, seed, ids in zip(prompts, seeds, expected, strict=True):
        new = exported.generate(torch.tensor([prompt]), max_new_tokens=8, seeds=[seed], guidance=2.0)
        assert new[0, len(prompt) :].tolist()[: len(ids)] == ids
