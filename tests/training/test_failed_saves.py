"""A checkpoint that cannot be written, wherever the disk is full, costs nothing but itself."""

import errno
import io
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_bitlm.data.tokenizer import Tokenizer
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.model.checkpoint import complete_checkpoints
from megatron_bitlm.training import checkpoint as checkpoint_module
from megatron_bitlm.training.callbacks import MetricsFile, TensorBoard
from megatron_bitlm.training.checkpoint_writing import _reason
from megatron_bitlm.training.config import RunConfig
from megatron_bitlm.training.trainer import pretrain
from tests.distributed_harness import run_ranks
from tests.training_runs import checkpoint_tensors, read_metrics, run_config, train

SETTINGS = {"validation__interval_steps": 0, "checkpoint__interval_steps": 1, "checkpoint__keep_last": 20}


def full(path: Path | str) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def failing(function: Callable, path_of: Callable[..., Path | str], is_doomed: Callable[[str], bool]) -> Callable:
    def call(*arguments, **settings):
        path = str(path_of(*arguments, **settings))
        if is_doomed(path):
            raise full(path)
        return function(*arguments, **settings)

    return call


def fill_disk(monkeypatch, places: dict[int, str]) -> None:
    """No room at these steps: for one of the files, by the name of what writes it."""

    def doomed(place: str) -> Callable[[str], bool]:
        folders = {f".step_{step:08d}.tmp" for step, chosen in places.items() if chosen == place}
        return lambda path: any(folder in path for folder in folders)

    original = FileSystemWriterAsync.write_preloaded_data

    def write_tensors(transforms, index, bucket, results, unfinished, use_fsync):
        if doomed("killed writer")(bucket[0]):
            os.kill(os.getpid(), signal.SIGKILL)
        if doomed("tensors")(bucket[0]):
            bucket = ("/dev/full", *bucket[1:])  # takes nothing, with the system's own error
        original(transforms, index, bucket, results, unfinished, use_fsync=use_fsync)

    monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(write_tensors))
    for owner, name, path_of, place in (
        (Path, "write_bytes", lambda self, *_: self, "what is not sharded"),
        (FileSystemWriterAsync, "finish", lambda self, *_: self.checkpoint_dir, "index"),
        (Tokenizer, "save", lambda self, path: path, "tokenizer"),
        (checkpoint_module, "write_atomic", lambda path, content: path, "meta"),
        (Path, "mkdir", lambda self, *_, **__: self, "folder"),
    ):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name), path_of, doomed(place)))


class FullStream(io.BytesIO):
    """Takes some bytes and no more, as a disk does that fills up meanwhile."""

    def write(self, content) -> int:
        if self.tell() + len(content) > 500:
            raise full("stream")
        return super().write(content)


def test_the_system_s_reason_is_told_not_torch_s():
    try:
        torch.save(torch.ones(10_000), FullStream())
    except Exception as error:
        assert _reason(error).startswith("[Errno 28] No space left on device")
    assert _reason(KeyError()) == "KeyError"


def assert_same_tensors(ours: Path, theirs: Path, step: int) -> None:
    expected = checkpoint_tensors(theirs, step)
    assert len(expected) > 50
    for name, tensor in checkpoint_tensors(ours, step).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dataset) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    train(directory, dataset, **SETTINGS)
    return directory


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_goes_on_after_failed_saves(tmp_path, dataset, whole, monkeypatch, capsys, asynchronous):
    places = {2: "tensors", 3: "index", 5: "what is not sharded", 6: "tokenizer", 8: "meta", 9: "folder"}
    if asynchronous:
        places[11] = "killed writer"
    fill_disk(monkeypatch, places)
    outcome = train(tmp_path / "run", dataset, **SETTINGS, checkpoint__asynchronous=asynchronous)
    assert outcome.finished
    folder = tmp_path / "run" / "checkpoints"
    kept = [step for step in range(1, 13) if step not in places]
    assert [step for step, _ in complete_checkpoints(folder)] == kept
    assert sorted(os.listdir(folder)) == ["latest", *(f"step_{step:08d}" for step in kept)]
    assert read_metrics(tmp_path / "run") == read_metrics(whole)
    for step in kept:
        assert_same_tensors(tmp_path / "run", whole, step)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == len(places)
    for step, warning in zip(places, warnings, strict=True):
        reason = "was killed" if places[step] == "killed writer" else "No space left on device"
        assert f"checkpoint {folder / f'step_{step:08d}'} was not written" in warning and reason in warning


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_ends_the_run_and_costs_nothing_saved(tmp_path, dataset, whole, monkeypatch, asynchronous):
    settings = {**SETTINGS, "checkpoint__asynchronous": asynchronous}
    folder = tmp_path / "run" / "checkpoints"
    with monkeypatch.context() as patches:
        fill_disk(patches, dict.fromkeys(range(4, 20), "tensors"))
        with pytest.raises(BitLMError, match=f"checkpoint {folder}/step_00000006 was not written .* make room"):
            train(tmp_path / "run", dataset, **settings)
    assert (folder / "latest").read_text() == "step_00000003\n"
    assert sorted(os.listdir(folder)) == ["latest", "step_00000001", "step_00000002", "step_00000003"]
    train(tmp_path / "run", dataset, **settings)
    assert read_metrics(tmp_path / "run") == read_metrics(whole)
    assert_same_tensors(tmp_path / "run", whole, 12)


def test_a_failed_last_save_is_an_error(tmp_path, dataset, monkeypatch):
    fill_disk(monkeypatch, {12: "tensors"})
    with pytest.raises(BitLMError, match="step_00000012 was not written"):
        train(tmp_path / "run", dataset, **SETTINGS)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000011\n"


def test_an_error_elsewhere_completes_the_save_that_was_on_its_way(tmp_path, dataset, monkeypatch):
    """The writer of step 3 is still busy when step 4 fails."""
    original = FileSystemWriterAsync.write_preloaded_data
    may_end = multiprocessing.get_context("fork").Event()

    def write_late(*arguments, **settings):
        may_end.wait(60)
        original(*arguments, **settings)

    def fail(self, step: int, *_):
        if step == 4:
            may_end.set()
            raise ZeroDivisionError("somewhere")
        return step_of(self, step, *_)

    from megatron_bitlm.training.step import TrainingStep

    step_of = TrainingStep.__call__
    monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(write_late))
    monkeypatch.setattr(TrainingStep, "__call__", fail)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", dataset, **{**SETTINGS, "checkpoint__interval_steps": 3})
    assert os.listdir(tmp_path / "run" / "checkpoints") != []
    assert [step for step, _ in complete_checkpoints(tmp_path / "run" / "checkpoints")] == [3]


def one_rank_fails(config: RunConfig) -> str:
    patches = pytest.MonkeyPatch()
    if os.environ["RANK"] == "1":
        fill_disk(patches, {2: "tensors"})
    try:
        pretrain(config)
    except BitLMError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_all_ranks_hear_of_one_that_cannot_write(tmp_path, dataset, asynchronous):
    config = run_config(
        tmp_path / "run",
        dataset,
        **SETTINGS,
        parallel__tensor_model_parallel_size=2,
        checkpoint__asynchronous=asynchronous,
        checkpoint__failed_saves_allowed=0,
    )
    errors = run_ranks(one_rank_fails, 2, config)
    assert errors[0] == errors[1] and "step_00000002 was not written" in errors[0]
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["latest", "step_00000001"]


class FullFile:
    """An open file on a full disk."""

    def write(self, text: str) -> int:
        raise full("metrics.jsonl")

    def close(self) -> None:
        raise full("metrics.jsonl")


def test_a_record_that_cannot_be_written_is_one_sentence(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.file = FullFile()
    with pytest.raises(BitLMError, match="metrics.jsonl cannot be written .*No space left on device"):
        metrics.on_step({"step": 1})
    metrics.on_end()


def test_tensorboard_is_given_up_with_a_warning(tmp_path, monkeypatch, capsys):
    events = TensorBoard(tmp_path / "tensorboard")
    events.on_start(0, 2)
    monkeypatch.setattr(events.writer, "add_scalar", failing(print, lambda *_: tmp_path, lambda path: True))
    for step in (1, 2):
        events.on_step({"step": step, "loss": 1.0})
    events.on_end()
    assert capsys.readouterr().err.count("no more events in") == 1
