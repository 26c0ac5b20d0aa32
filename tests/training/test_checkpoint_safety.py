"""Loading a checkpoint never runs what lies in it, whichever of its pickles names a function."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject

from megatron_bitlm.cli import main
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.inference.load import loaded_model
from megatron_bitlm.parallel.safe_loading import load_sharded, read_common_state, read_tensor_metadata
from megatron_bitlm.parallel.state import ParallelConfig, initialize_parallel, shutdown_parallel
from tests.training_runs import train

SETTINGS = {"training__num_steps": 5, "validation__interval_steps": 0}


class Payload:
    """A pickle of this makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def made(tmp_path_factory, dataset) -> Path:
    directory = tmp_path_factory.mktemp("made") / "run"
    train(directory, dataset, **SETTINGS, training__stop_after_steps=4)
    return directory


@pytest.fixture
def run(tmp_path, made) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step_00000004"


def poison_metadata(path: Path, payload: Payload) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(payload))


def poison_within_metadata(path: Path, payload: Payload) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = {"harmless": payload}
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def poison_common(path: Path, payload: Payload) -> None:
    state = torch.load(path / "common.pt", weights_only=True)
    torch.save({**state, "extra": payload}, path / "common.pt")


def point_outside(path: Path, payload: Payload) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../../elsewhere"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def make_consistent(path: Path) -> None:
    """Sizes and checksums of what lies there now, as whoever put it there would write them."""
    meta = json.loads((path / "meta.json").read_text())
    for name, known in meta["files"].items():
        content = (path / name).read_bytes()
        known.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (path / "meta.json").write_text(json.dumps(meta))


POISONS = [poison_metadata, poison_within_metadata, poison_common, point_outside]


@pytest.mark.parametrize("poison", POISONS)
def test_no_way_to_load_runs_what_lies_in_a_checkpoint(run, tmp_path, dataset, poison, capsys):
    path, made_by_payload = newest(run), tmp_path / "made-by-payload"
    poison(path, Payload(made_by_payload))
    make_consistent(path)
    resume = {**SETTINGS, "checkpoint__asynchronous": False}
    with pytest.raises(BitLMError, match="nothing of it was run; do not use this checkpoint"):
        train(run, dataset, **resume)
    if poison is not poison_common:  # generation and evaluation need the weights alone
        with pytest.raises(BitLMError, match="nothing of it was run"), loaded_model(path):
            pass
    assert main(["generate", "--checkpoint", str(run), "--prompt", "a", "--max-new-tokens", "4"]) == 2
    assert main(["checkpoint", "verify", str(run)]) == 2
    printed = capsys.readouterr()
    assert "nothing of it was run" in printed.err and "Traceback" not in printed.err + printed.out
    assert not made_by_payload.exists()
    assert path.is_dir(), "a checkpoint that is refused is left for a look at it"


def test_the_payload_would_have_run(tmp_path):
    """Else the test above could not fail."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "one")))
    torch.save([Payload(tmp_path / "two")], tmp_path / "saved")
    torch.load(tmp_path / "saved", weights_only=False)
    assert (tmp_path / "one").is_dir() and (tmp_path / "two").is_dir()


def test_an_object_among_the_tensors_is_plain_data_or_refused(tmp_path):
    """Our checkpoints have none; torch's own reader would give them to `torch.load(weights_only=False)`."""

    def state(item) -> dict:
        return {"object": ShardedObject("object", item, (1,), (0,))}

    initialize_parallel(ParallelConfig(), seed=0)
    try:
        for name, item in (("plain", [1, "two", torch.ones(3)]), ("code", Payload(tmp_path / "made-by-payload"))):
            (tmp_path / name).mkdir()
            dist_checkpointing.save(state(item), str(tmp_path / name))
        assert str(load_sharded(state(None), tmp_path / "plain")["object"]) == "[1, 'two', tensor([1., 1., 1.])]"
        with pytest.raises(BitLMError, match="code holds an object among its tensors that is more than plain data"):
            load_sharded(state(None), tmp_path / "code")
    finally:
        shutdown_parallel()
    assert not (tmp_path / "made-by-payload").exists()


def test_an_environment_variable_does_not_turn_it_off(run, tmp_path, monkeypatch):
    poison_common(newest(run), Payload(tmp_path / "made-by-payload"))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(BitLMError, match="common.pt holds more than plain data"):
        read_common_state(newest(run))
    assert not (tmp_path / "made-by-payload").exists()


def test_what_the_files_say_is_read_as_torch_reads_it(made):
    path = newest(made)
    assert read_tensor_metadata(path) == pickle.loads((path / ".metadata").read_bytes())
    assert read_common_state(path) == torch.load(path / "common.pt", weights_only=False)


@pytest.mark.parametrize("content", [b"", b"\x80", b"cos\nsystem\n.", pickle.dumps({"a": 1}), pickle.dumps(len)])
def test_a_description_that_is_none_is_named(run, content):
    (newest(run) / ".metadata").write_bytes(content)
    with pytest.raises(BitLMError, match=r"step_00000004/\.metadata is not the description of a checkpoint"):
        read_tensor_metadata(newest(run))
