"""The softmax baseline in every kind of layout trains what one process trains: whole runs in fp32 on packed documents.

A vocabulary of 258 ids in 264 rows, so that the padding lies on the last tensor-parallel rank.
"""

import pytest
import torch

from megatron_bitlm.inference.load import loaded_model
from megatron_bitlm.training.trainer import pretrain
from tests.distributed.train_run import run_all
from tests.distributed_harness import free_port, run_ranks
from tests.training_runs import corpus, make_dataset, read_metrics, run_config

NUM_STEPS = 4
COMMON = {
    "model__output": "softmax",
    "model__softmax": {"make_vocab_size_divisible_by": 8},
    "training__num_steps": NUM_STEPS,
    "optimizer__warmup_steps": 1,
    "optimizer__clip_grad": 0.5,
    "training__micro_batch_size": 2,
    "validation__interval_steps": 2,
    "checkpoint__interval_steps": 0,
}
TIED = {"model__softmax": {"make_vocab_size_divisible_by": 8, "tie_embeddings": True}}
ONE_RANK = {"one": {}, "one tied": TIED}
TENSOR, PIPELINE = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
VIRTUAL = "parallel__virtual_pipeline_model_parallel_size"
TWO_RANKS = {
    "TP2": {TENSOR: 2},
    "TP2 SP recomputed": {TENSOR: 2, "parallel__sequence_parallel": True, "parallel__recompute": "full"},
    "PP2": {PIPELINE: 2},
    "PP2 VPP2": {PIPELINE: 2, VIRTUAL: 2, "parallel__pipeline_model_parallel_layout": "E|t|t|L"},
    "CP2": {"parallel__context_parallel_size": 2},
    "DP2": {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True},
    "TP2 SP tied": {TENSOR: 2, "parallel__sequence_parallel": True, **TIED},
}
FOUR_RANKS = {"PP2 DP2 tied": {PIPELINE: 2, **TIED}}


def run(folder, prefix, layouts, world_size):
    configs = [run_config(folder / name.replace(" ", "_"), prefix, **{**COMMON, **layouts[name]}) for name in layouts]
    if world_size == 1:
        torch.set_num_threads(1)
        for config in configs:
            pretrain(config)
    else:
        run_ranks(run_all, world_size, [free_port() for _ in layouts], configs, timeout_s=240)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    prefix = make_dataset(folder, "docs", corpus())
    run(folder, prefix, ONE_RANK, 1)
    run(folder, prefix, TWO_RANKS, 2)
    run(folder, prefix, FOUR_RANKS, 4)
    return folder


def reference(name):
    return "one_tied" if name.endswith("tied") else "one"


@pytest.mark.parametrize("name", [*TWO_RANKS, *FOUR_RANKS])
def test_a_layout_trains_what_one_process_does(name, runs):
    ours, theirs = read_metrics(runs / name.replace(" ", "_")), read_metrics(runs / reference(name))
    assert len(ours) == len(theirs) == NUM_STEPS
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.keys() == expected.keys()
        for key, value in expected.items():
            assert mine[key] == pytest.approx(value, rel=1e-5), f"step {expected['step']}: {key}"
    assert theirs[-1]["loss"] < theirs[0]["loss"] - 0.1


@pytest.mark.parametrize("name", [*TWO_RANKS, *FOUR_RANKS])
def test_one_process_reads_its_checkpoint(name, runs):
    with loaded_model(runs / reference(name)) as loaded:
        expected = {key: value.clone() for key, value in loaded.model.state_dict().items() if torch.is_tensor(value)}
    with loaded_model(runs / name.replace(" ", "_")) as loaded:
        found = {key: value for key, value in loaded.model.state_dict().items() if torch.is_tensor(value)}
    assert found.keys() == expected.keys()
    assert ("output_layer.weight" in found) == (not name.endswith("tied"))
    for key, value in expected.items():
        assert (found[key] - value).abs().max() < 2e-5, key


def test_tied_tables_are_another_model_and_padding_stays_zero(runs):
    assert read_metrics(runs / "one")[0]["loss"] != read_metrics(runs / "one_tied")[0]["loss"]
    with loaded_model(runs / "TP2") as loaded:
        table = loaded.model.output_layer.weight
        assert table.shape[0] == 264 and (table[258:] == 0).all() and (table[:258] != 0).all()
