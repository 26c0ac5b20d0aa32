"""Checkpoints are complete or absent, and belong to one code and tokenizer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bitlm.cli import main
from megatron_bitlm.data.tokenizer_loading import load_tokenizer
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.inference.load import loaded_model
from megatron_bitlm.model.checkpoint import complete_checkpoints, find_checkpoint, load_code, read_meta
from tests.training_runs import TIMINGS, checkpoint_tensors, corpus, make_dataset, read_metrics, train


@pytest.fixture(scope="module")
def made(tmp_path_factory, dataset):
    """A finished run of 12 steps with a checkpoint every 4, two of which are kept."""
    directory = tmp_path_factory.mktemp("made") / "run"
    train(directory, dataset, checkpoint__keep_last=2, validation__interval_steps=0)
    return directory


@pytest.fixture
def copied(tmp_path, made):
    """A copy of it to damage; its newest checkpoint."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step_00000012"


def edit(path, **changes):
    meta = json.loads((path / "meta.json").read_text())
    for name, value in changes.items():
        target = meta["data"] if name in meta["data"] else meta
        target[name] = value
    (path / "meta.json").write_text(json.dumps(meta))


def test_the_newest_are_kept_and_nothing_else_lies_about(made):
    folder = made / "checkpoints"
    assert [step for step, _ in complete_checkpoints(folder)] == [8, 12]
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000008", "step_00000012"]
    assert (folder / "latest").read_text() == "step_00000012\n"


def test_a_checkpoint_says_what_it_is(made, dataset):
    meta = read_meta(find_checkpoint(made))
    card = json.loads(Path(f"{dataset}.json").read_text())
    assert meta["step"] == 12 and meta["version"] == 2
    assert meta["data"]["tokenizer_fingerprint"] == card["tokenizer_fingerprint"]
    assert meta["settings"]["model.head.width"] == 32 and meta["settings"]["run.seed"] == 1
    path = find_checkpoint(made)
    assert load_tokenizer(path / "tokenizer").fingerprint == card["tokenizer_fingerprint"]
    assert load_code(path, meta).vocab_size == card["vocab_size"]
    stored = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert stored == {*meta["files"], "meta.json"}


def test_a_run_a_folder_or_a_step_name_a_checkpoint(made):
    newest = made / "checkpoints" / "step_00000012"
    older = made / "checkpoints" / "step_00000008"
    assert find_checkpoint(made) == find_checkpoint(made / "checkpoints") == find_checkpoint(newest) == newest
    assert find_checkpoint(str(older)) == older


def test_no_checkpoint_is_an_error(tmp_path, copied):
    with pytest.raises(BitLMError, match=f"no complete checkpoint in {tmp_path / 'nothing'}"):
        find_checkpoint(tmp_path / "nothing")
    (copied / "meta.json").unlink()
    assert find_checkpoint(copied.parent.parent).name == "step_00000008"
    with pytest.raises(BitLMError, match=f"no complete checkpoint in {copied}"):
        find_checkpoint(copied)


def test_a_truncated_or_missing_file_is_named(copied, dataset):
    part = next(copied.glob("*.distcp"))
    size = part.stat().st_size
    part.write_bytes(part.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in copied.parent.parent.rglob("*") if path.is_file()}
    with pytest.raises(BitLMError, match=f"{part} has {size - 1} bytes instead of {size}; use an earlier"):
        read_meta(copied)
    assert before == {path: path.read_bytes() for path in copied.parent.parent.rglob("*") if path.is_file()}
    part.unlink()
    with pytest.raises(BitLMError, match=f"{part} is missing"):
        read_meta(copied)


@pytest.mark.parametrize("harm", ["flip", "truncate", "meta"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(copied, made, dataset, harm, capsys):
    run = copied.parent.parent
    victim = copied / "meta.json" if harm == "meta" else max(copied.glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    victim.write_bytes(content if harm == "flip" else content[: len(content) // 2])
    train(run, dataset, checkpoint__keep_last=2, validation__interval_steps=0)
    assert "step_00000012 is set aside" in capsys.readouterr().err
    assert (run / "checkpoints" / "step_00000012.damaged").is_dir()
    assert [step for step, _ in complete_checkpoints(run / "checkpoints")] == [8, 12]
    assert run_without_timings(run) == run_without_timings(made)
    for name, tensor in checkpoint_tensors(made, 12).items():
        assert torch.equal(tensor, checkpoint_tensors(run, 12)[name]), name


def run_without_timings(directory):
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in read_metrics(directory)]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(copied, dataset):
    run = copied.parent.parent
    for part in run.glob("checkpoints/step_*/*.distcp"):
        part.write_bytes(b"")
    with pytest.raises(BitLMError, match="every checkpoint in .* is damaged"):
        train(run, dataset, checkpoint__keep_last=2, validation__interval_steps=0)


def test_checkpoints_of_every_so_many_steps_are_kept_for_good(tmp_path, dataset):
    settings = {"checkpoint__interval_steps": 2, "checkpoint__keep_last": 1, "checkpoint__keep_every_steps": 6}
    train(tmp_path / "run", dataset, validation__interval_steps=0, training__num_steps=10, **settings)
    assert [step for step, _ in complete_checkpoints(tmp_path / "run" / "checkpoints")] == [6, 10]


def test_the_command_lists_verifies_and_shows(copied, capsys):
    run = str(copied.parent.parent)
    assert main(["checkpoint", "list", run]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step", "8", "12"]
    assert main(["checkpoint", "verify", run]) == 0
    assert capsys.readouterr().out.count("every checksum matches") == 2
    assert main(["checkpoint", "show", run]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 12
    part = next(copied.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    assert main(["checkpoint", "verify", run]) == 2
    printed = capsys.readouterr()
    assert f"{part} does not match its checksum" in printed.out and "not to be used: step_00000012" in printed.err
    assert main(["checkpoint", "list", str(copied / "nothing")]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "meta.json is not a bitlm-checkpoint of version 2"),
        ({"format": "gpt"}, "meta.json is not a bitlm-checkpoint of version 2"),
        ({"code_map_hash": "feed"}, "the code map in .* is not the one the checkpoint was trained with"),
        ({"tokenizer_fingerprint": "feed"}, "tokenizer is not the tokenizer the checkpoint was trained with"),
    ],
)
def test_what_does_not_belong_together_is_refused(copied, changes, message):
    edit(copied, **changes)
    with pytest.raises(BitLMError, match=message), loaded_model(copied):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_broken_meta_file_is_named(copied, content):
    (copied / "meta.json").write_text(content)
    with pytest.raises(BitLMError, match=str(copied / "meta.json")):
        read_meta(copied)


def test_a_setting_of_another_release_is_named(copied):
    meta = json.loads((copied / "meta.json").read_text())
    meta["settings"]["model.head.flavour"] = "mint"
    (copied / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(BitLMError, match="model.head.flavour is unknown"), loaded_model(copied):
        pass


def test_a_run_goes_on_only_with_its_own_data(tmp_path, made):
    """The prefix is the same, the dataset behind it is another: first its code map, then its tokenizer."""
    folder = tmp_path / "data"
    folder.mkdir()
    prefix = make_dataset(folder, "docs", corpus())
    train(tmp_path / "run", prefix, training__stop_after_steps=2)
    for path in folder.glob("docs.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    np.save(tmp_path / "map.npy", np.random.default_rng(0).permutation(258))
    make_dataset(folder, "docs", corpus(), code_map=str(tmp_path / "map.npy"))
    with pytest.raises(BitLMError, match=r"step 2 was trained with code_map_hash 'identity', but .*docs.json has"):
        train(tmp_path / "run", prefix)
    for path in folder.glob("docs.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    make_dataset(folder, "docs", corpus(), tokenizer="train:bpe:300")
    with pytest.raises(BitLMError, match="step 2 was trained with vocab_size 258, but .*docs.json has 300"):
        train(tmp_path / "run", prefix)


def test_a_code_map_travels_with_the_checkpoint(tmp_path):
    code_map = np.random.default_rng(1).permutation(258)
    np.save(tmp_path / "map.npy", code_map)
    prefix = make_dataset(tmp_path, "docs", corpus(), code_map=str(tmp_path / "map.npy"))
    train(tmp_path / "run", prefix, training__stop_after_steps=1)
    with loaded_model(tmp_path / "run") as loaded:
        assert np.array_equal(loaded.code.code_map, code_map)
