"""`bitlm calibrate`: what it stores, who uses it, and files that are not what they should be."""

import json
import shutil

import numpy as np
import pytest
import torch

from megatron_bitlm.cli import main
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.evaluation.calibrate import entropy_rates
from megatron_bitlm.inference.command import continue_texts
from megatron_bitlm.inference.load import loaded_model
from megatron_bitlm.inference.profile import PROFILE_FILE, read_profile, write_profile
from megatron_bitlm.method.path import TabulatedTime
from megatron_bitlm.method.sampler import SamplerConfig
from megatron_bitlm.model.checkpoint import read_meta
from megatron_bitlm.training.likelihood import BoundReport
from tests.training_runs import corpus, make_dataset, train

EDGES, RATES = np.linspace(-9.0, 4.4, 9), [0.1, 0.3, 0.2, 4.0, 3.0, 0.5, 0.2, 0.1]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    prefix = make_dataset(folder, "data", corpus())
    train(folder / "run", prefix, training__num_steps=2, optimizer__warmup_steps=1, optimizer__learning_rate=0.02)
    return folder / "run"


@pytest.fixture
def checkpoint(run_folder, tmp_path):
    """A copy of the checkpoint, to calibrate."""
    return shutil.copytree(run_folder / "checkpoints" / "step_00000002", tmp_path / "step_00000002")


def test_the_command_stores_a_profile_that_the_model_comes_back_with(checkpoint, capsys):
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    assert main(["calibrate", str(checkpoint), "--num-samples", "16", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {path: path.read_bytes() for path in before} == before
    assert printed["file"] == str(checkpoint / PROFILE_FILE) and printed["num_blocks"] > 100
    read_meta(checkpoint)
    with loaded_model(checkpoint) as loaded:
        assert torch.equal(loaded.profile.mass, read_profile(checkpoint).mass)
        assert loaded.profile.edges[[0, -1]].tolist() == [-9.0, 4.4]
    assert main(["calibrate", str(checkpoint), "--num-samples", "8"]) == 2
    error = capsys.readouterr().err
    assert PROFILE_FILE in error and "--replace" in error
    assert main(["calibrate", str(checkpoint), "--num-samples", "8", "--replace"]) == 0
    assert "entropy grid of 15 steps: 1.000 " in capsys.readouterr().out
    assert not list(checkpoint.glob("*.tmp"))


def test_the_entropy_grid_follows_the_stored_profile_and_other_grids_do_not(checkpoint):
    def texts(grid, **more):
        with loaded_model(checkpoint) as loaded:
            sampler = SamplerConfig(num_steps=5, guidance=2.0, grid=grid, **more)
            return [r.ids for r in continue_texts(loaded, ["ab", "c"], sampler=sampler, max_new_tokens=24, seed=0)]

    variants = {"entropy": {}, "uniform": {}, "logsnr": {"noise_raise": 0.4}}
    before = {grid: texts(grid, **more) for grid, more in variants.items()}
    write_profile(checkpoint, EDGES, RATES, measured_on={})
    after = {grid: texts(grid, **more) for grid, more in variants.items()}
    assert after["uniform"] == before["uniform"]
    assert after["entropy"] != before["entropy"] and after["logsnr"] != before["logsnr"]


def test_rates_are_those_of_the_error_profile():
    mse = np.array([0.9, np.nan, 0.5, 0.1])
    report = BoundReport(None, 0, False, np.array([-2.0, -1.0, 0.0, 1.0, 2.0]), mse, 7)
    edges, rates = entropy_rates(report, bits_per_block=6)
    centres = np.array([-1.5, -0.5, 0.5, 1.5])
    np.testing.assert_allclose(rates, 3 * np.exp(centres) * [0.9, 0.7, 0.5, 0.1])
    assert edges is report.edges


def test_a_profile_comes_back_as_it_was(checkpoint):
    assert read_profile(checkpoint) is None
    write_profile(checkpoint, EDGES, RATES, measured_on={"data": ["x"]})
    expected = TabulatedTime(EDGES, np.array(RATES) * np.diff(EDGES))
    assert torch.equal(read_profile(checkpoint).mass, expected.mass)
    assert torch.equal(read_profile(checkpoint).edges, expected.edges)


def cut(file):
    file.write_text(file.read_text()[:-40])
    return "cannot read"


def change_a_rate(file):
    file.write_text(file.read_text().replace("4.0", "5.0", 1))
    return "does not match its checksum"


def not_an_object(file):
    file.write_text("[1]")
    return "cannot read"


def of_another_checkpoint(file):
    meta = file.with_name("meta.json")
    meta.write_text(meta.read_text() + "\n")
    return "measured with another checkpoint"


@pytest.mark.parametrize("spoil", [cut, change_a_rate, not_an_object, of_another_checkpoint])
def test_a_damaged_profile_ends_with_one_sentence(checkpoint, spoil, capsys):
    words = spoil(write_profile(checkpoint, EDGES, RATES, measured_on={}))
    assert main(["generate", "--checkpoint", str(checkpoint), "--prompt", "a", "--max-new-tokens", "2"]) == 2
    error = capsys.readouterr().err
    assert words in error and PROFILE_FILE in error and error.count("\n") == 1


def test_values_that_are_no_profile_are_not_stored(checkpoint):
    with pytest.raises(BitLMError, match="would hold no entropy profile"):
        write_profile(checkpoint, EDGES, [np.nan] * 8, measured_on={})
    assert not (checkpoint / PROFILE_FILE).exists()


def test_a_softmax_model_has_nothing_to_calibrate(tmp_path, capsys):
    prefix = make_dataset(tmp_path, "data", corpus(num_documents=48))
    train(tmp_path / "run", prefix, training__num_steps=1, optimizer__warmup_steps=0, model__output="softmax")
    assert main(["calibrate", str(tmp_path / "run")]) == 2
    assert "calibrate a BitLM" in capsys.readouterr().err
