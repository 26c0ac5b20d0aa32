"""Checkpoints written beside training: of the step they are named after, complete or absent, on one and more ranks."""

import multiprocessing
import os

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_bitlm.model.checkpoint import complete_checkpoints, read_meta
from megatron_bitlm.training.checkpoint import CheckpointConfig, CheckpointManager
from megatron_bitlm.training.config import RunConfig
from megatron_bitlm.training.trainer import pretrain
from tests.distributed.trap_run import open_session
from tests.distributed_harness import run_ranks
from tests.training_runs import checkpoint_tensors, read_metrics, run_config, train

SHORT = {"training__num_steps": 6, "validation__interval_steps": 0}
EVERY_STEP = {**SHORT, "checkpoint__interval_steps": 1, "checkpoint__keep_last": 6}
SOME_STEPS = {**SHORT, "checkpoint__interval_steps": 2, "checkpoint__keep_last": 2}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_snapshot_is_of_its_step_though_training_goes_on(tmp_path, dataset):
    """A save is due at every step: each is written while the next step changes the weights."""
    for name, asynchronous in (("beside", True), ("waiting", False)):
        train(tmp_path / name, dataset, checkpoint__asynchronous=asynchronous, **EVERY_STEP)
    assert read_metrics(tmp_path / "beside") == read_metrics(tmp_path / "waiting")
    steps = [step for step, _ in complete_checkpoints(tmp_path / "beside" / "checkpoints")]
    assert steps == list(range(1, 7))
    for step in steps:
        assert_same(checkpoint_tensors(tmp_path / "beside", step), checkpoint_tensors(tmp_path / "waiting", step))


def save_on_ranks(config: RunConfig) -> bool:
    return pretrain(config).finished


@pytest.mark.parametrize("layout", [{"tensor_model_parallel_size": 2}, {"use_distributed_optimizer": True}])
def test_two_ranks_complete_a_save_together(tmp_path, dataset, layout):
    settings = {f"parallel__{name}": value for name, value in layout.items()} | SOME_STEPS
    for name, asynchronous in (("beside", True), ("waiting", False)):
        config = run_config(tmp_path / name, dataset, checkpoint__asynchronous=asynchronous, **settings)
        assert run_ranks(save_on_ranks, 2, config) == [True, True]
    checkpoints = tmp_path / "beside" / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["latest", "step_00000004", "step_00000006"]
    assert len([name for name in read_meta(checkpoints / "step_00000006")["files"] if name.endswith(".distcp")]) >= 2
    assert_same(checkpoint_tensors(tmp_path / "beside", 6), checkpoint_tensors(tmp_path / "waiting", 6))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_written_late_is_what_was_there_at_the_save(tmp_path, dataset, monkeypatch, device, precision):
    """The writer starts only after four more steps; a blocking save of the same step tells what it should write."""
    may_write = multiprocessing.get_context("fork").Event()
    original = FileSystemWriterAsync.write_preloaded_data

    def write_late(*arguments, **settings):
        assert may_write.wait(60)
        original(*arguments, **settings)

    with open_session(run_config(tmp_path / "run", dataset, training__precision=precision)) as (session, _):
        assert session.state.device.type == device
        ours = session.checkpoints

        def manager(name: str, *, asynchronous: bool) -> CheckpointManager:
            config = CheckpointConfig(asynchronous=asynchronous)
            folder = tmp_path / name / "checkpoints"
            return CheckpointManager(folder, config, ours.chunks, ours.optimizer, ours.scheduler)

        waiting, beside = manager("waiting", asynchronous=False), manager("beside", asynchronous=True)
        batches = iter(session.loader(0))
        session.step(1, session.next_inputs(batches))
        waiting.save(1, {}, session.facts.tokenizer, session.facts.code)
        monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(write_late))
        beside.save(1, {}, session.facts.tokenizer, session.facts.code)
        for step in range(2, 6):
            beside.poll()
            session.step(step, session.next_inputs(batches))
        assert complete_checkpoints(tmp_path / "beside" / "checkpoints") == []
        may_write.set()
        beside.finish()
        before = checkpoint_tensors(tmp_path / "waiting", 1)
        assert_same(checkpoint_tensors(tmp_path / "beside", 1), before)
        waiting.save(5, {}, session.facts.tokenizer, session.facts.code)
        after = checkpoint_tensors(tmp_path / "waiting", 5)
        assert all(not torch.equal(after[name], tensor) for name, tensor in before.items() if "exp_avg_sq" in name)
