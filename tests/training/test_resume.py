"""A run that stops, for whatever reason, goes on as if it had not."""

import json
import shutil
import signal

import pytest
import torch

from tests.training_runs import (
    checkpoint_tensors,
    kill_at_step,
    read_metrics,
    run_config,
    start_run,
    train,
)

LONG = {"training__num_steps": 40, "checkpoint__interval_steps": 10, "validation__interval_steps": 15}


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dataset):
    """An uninterrupted run of 40 steps."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    outcome = train(directory, dataset, **LONG)
    assert outcome.finished and outcome.step == 40
    return directory


def test_a_killed_run_resumes_bit_for_bit(tmp_path, dataset, whole):
    directory = tmp_path / "run"
    process = start_run(run_config(directory, dataset, **LONG))
    assert kill_at_step(process, directory, 13) == -signal.SIGKILL
    reached = read_metrics(directory)[-1]["step"]
    assert 13 <= reached < 40, "the run was over before the kill"
    outcome = train(directory, dataset, **LONG)
    assert outcome.finished and outcome.step == 40
    assert read_metrics(directory) == read_metrics(whole)
    assert_same_tensors(checkpoint_tensors(directory, 40), checkpoint_tensors(whole, 40))


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, dataset, whole):
    directory = tmp_path / "run"
    process = start_run(run_config(directory, dataset, **LONG))
    assert kill_at_step(process, directory, 2) == -signal.SIGKILL
    for path in (directory / "checkpoints").glob("*"):  # had it come further than it should
        shutil.rmtree(path)
    train(directory, dataset, **LONG, training__stop_after_steps=10)
    assert read_metrics(directory) == read_metrics(whole)[:10]


def test_a_session_that_stops_early_resumes_bit_for_bit(tmp_path, dataset, whole):
    directory = tmp_path / "run"
    for stop in (7, 7, 23, None):
        outcome = train(directory, dataset, **LONG, training__stop_after_steps=stop)
        assert outcome.step == (stop or 40) and outcome.finished == (stop is None)
        assert read_metrics(directory) == read_metrics(whole)[: outcome.step]
    assert_same_tensors(checkpoint_tensors(directory, 40), checkpoint_tensors(whole, 40))


def test_a_finished_run_is_left_as_it_is(dataset, whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and "tensorboard" not in str(path)}
    outcome = train(whole, dataset, **LONG)
    assert outcome.finished and outcome.step == 40
    assert before == {
        path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and "tensorboard" not in str(path)
    }


def test_what_a_kill_during_a_save_leaves_is_passed_over(tmp_path, dataset, whole):
    directory = tmp_path / "run"
    train(directory, dataset, **LONG, training__stop_after_steps=10)
    checkpoints = directory / "checkpoints"
    torn = checkpoints / ".step_00000020.tmp"
    shutil.copytree(checkpoints / "step_00000010", torn)
    (torn / "meta.json").unlink()
    next(torn.glob("*.distcp")).write_bytes(b"half")
    shutil.copytree(torn, checkpoints / "step_00000030")  # complete by its name only
    with open(directory / "metrics.jsonl", "a") as file:  # steps after the checkpoint, the last one cut off
        file.write(json.dumps({"step": 11, "loss": 9.0}) + '\n{"step": 12, "lo')
    train(directory, dataset, **LONG)
    assert read_metrics(directory) == read_metrics(whole)
    assert_same_tensors(checkpoint_tensors(directory, 40), checkpoint_tensors(whole, 40))
    assert_same_tensors(checkpoint_tensors(directory, 30), checkpoint_tensors(whole, 30))
    assert sorted(path.name for path in checkpoints.iterdir()) == sorted(
        path.name for path in (whole / "checkpoints").iterdir()
    )


def test_a_session_may_change_settings_that_do_not_change_the_result(tmp_path, dataset, whole):
    directory = tmp_path / "run"
    train(directory, dataset, **LONG, training__stop_after_steps=10)
    train(directory, dataset, **LONG, training__stop_after_steps=15, training__micro_batch_size=2)
    expected = read_metrics(whole)[:15]
    for ours, theirs in zip(read_metrics(directory), expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)


def test_accumulation_gives_the_loss_of_one_pass(tmp_path, dataset):
    common = {"training__num_steps": 3, "optimizer__warmup_steps": 1, "validation__interval_steps": 1}
    records = {}
    for size in (2, 8):
        train(tmp_path / str(size), dataset, **common, training__micro_batch_size=size, objective__samples_per_block=2)
        records[size] = read_metrics(tmp_path / str(size))
    for ours, theirs in zip(records[2], records[8], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            # Adam divides by the gradient's own size, so after some steps rounding shows in its norm.
            tolerance = 1e-4 if "norm" in name else 1e-6 if ours["step"] == 1 else 1e-5
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance), (ours["step"], name)


def test_bf16_resumes_bit_for_bit(tmp_path, dataset):
    settings = {"training__precision": "bf16", "training__num_steps": 8}
    train(tmp_path / "whole", dataset, **settings)
    train(tmp_path / "cut", dataset, **settings, training__stop_after_steps=5)
    train(tmp_path / "cut", dataset, **settings)
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")
    ours, theirs = (checkpoint_tensors(tmp_path / name, 8) for name in ("cut", "whole"))
    assert_same_tensors(ours, theirs)
    assert {tensor.dtype for tensor in ours.values()} >= {torch.bfloat16, torch.float32}
    assert all(record["loss"] > 0 for record in read_metrics(tmp_path / "cut"))
