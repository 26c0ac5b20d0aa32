"""A run's folder belongs to one run, and a look at it changes nothing."""

import pytest
import yaml

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.training.run_folder import RunFolder
from tests.training_runs import run_config


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "deep" / "run")


def config(folder, **overrides):
    return run_config(folder.path, "data/docs", **overrides)


def test_claiming_writes_the_configuration_once(folder):
    folder.check(config(folder))
    assert not folder.path.exists()
    folder.claim(config(folder))
    stored = yaml.safe_load(folder.config_file.read_text())
    assert stored["run"]["seed"] == 1 and stored["model"]["head"]["width"] == 32
    before = folder.config_file.stat().st_mtime_ns
    folder.claim(config(folder))
    assert folder.config_file.stat().st_mtime_ns == before
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "lock"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"run__seed": 2}, "run.seed is 1 there and 2 here"),
        ({"optimizer__learning_rate": 1e-3}, "optimizer.learning_rate is 0.002 there and 0.001 here"),
        ({"model__head__width": 64}, "model.head.width is 32 there and 64 here"),
        ({"training__num_steps": 13}, "training.num_steps is 12 there and 13 here"),
        ({"data__paths": ["data/docs", "data/more"]}, r"data.paths is \['data/docs'\] there"),
    ],
)
def test_another_run_is_refused(folder, override, message):
    folder.claim(config(folder))
    for attempt in (folder.check, folder.claim):
        with pytest.raises(BitLMError, match=f"run.directory {folder.path} already holds another run: {message}"):
            attempt(config(folder, **override))


def test_what_does_not_change_the_result_may_change(folder):
    folder.claim(config(folder))
    changes = {
        "checkpoint__interval_steps": 1,
        "training__micro_batch_size": 2,
        "training__stop_after_steps": 3,
        "validation__interval_steps": 2,
        "parallel__tensor_model_parallel_size": 2,
        "data__num_workers": 2,
    }
    folder.claim(config(folder, **changes))


def test_files_of_something_else_are_refused(folder):
    folder.path.mkdir(parents=True)
    (folder.path / "thesis.tex").write_text("precious")
    for attempt in (folder.check, folder.claim):
        with pytest.raises(BitLMError, match=f"{folder.path} holds files but no run"):
            attempt(config(folder))
    assert [path.name for path in folder.path.iterdir()] == ["thesis.tex"]


def test_a_claim_that_was_interrupted_is_made_again(folder):
    folder.path.mkdir(parents=True)
    (folder.path / "config.yaml.123.tmp").write_text("run: {se")
    folder.claim(config(folder))
    assert folder.config_file.exists()


@pytest.mark.parametrize("content", ["[1, 2]", "run: {seed", "3"])
def test_a_broken_configuration_is_named(folder, content):
    folder.path.mkdir(parents=True)
    folder.config_file.write_text(content)
    with pytest.raises(BitLMError, match=str(folder.config_file)):
        folder.check(config(folder))


def test_a_place_where_nothing_can_be_written_is_refused_before(tmp_path, monkeypatch):
    settings = run_config(tmp_path / "x", "data/docs")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(BitLMError, match=f"run.directory {path} cannot be made: {tmp_path / 'file'} is a file"):
            RunFolder(path).check(settings)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(BitLMError, match=f"run.directory {tmp_path / 'run'} cannot be written: no permission"):
        RunFolder(tmp_path / "run").check(settings)


def test_metrics_are_cut_to_the_checkpoint(folder):
    folder.claim(config(folder))
    folder.keep_metrics_through(3)  # nothing there yet
    folder.metrics_file.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)) + '{"step": 6')
    folder.keep_metrics_through(3)
    assert folder.metrics_file.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    folder.keep_metrics_through(0)
    assert folder.metrics_file.read_text() == ""
