"""A jump of the loss is seen, and a run that goes back behind it trains what it would have without that data."""

import json
import multiprocessing
import signal

import pytest
import torch

from megatron_bitlm.errors import BitLMError, DivergedError
from megatron_bitlm.training.anomalies import AnomalyConfig
from megatron_bitlm.training.session import Session
from megatron_bitlm.training.spikes import Rewind, Rewinds, is_spike, spike_begins
from tests.distributed_harness import free_port, run_ranks
from tests.training.faults import Faults, injected, run_with_faults
from tests.training_runs import checkpoint_tensors, kill_at_step, read_metrics, run_config, train

RULE = AnomalyConfig(spike_window_steps=8, spike_threshold=6.0, spike_patience_steps=2)
USUAL = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.02, 0.98]  # median 1, absolute deviations 0.02 to 0.1, their median 0.035


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ([1.32, 1.32], True),  # the limit is 1 + 6 x 1.4826 x 0.035 = 1.311
        ([1.32, 1.30], False),
        ([1.30, 1.32], False),
        ([9.0, 9.0], True),
        ([0.0, 0.0], False),
    ],
)
def test_a_spike_is_far_above_the_median_of_the_steps_before(last, expected):
    assert is_spike(USUAL + last, RULE) == expected
    assert not is_spike(USUAL[1:] + last, RULE)  # no whole window


def test_a_spike_begins_once():
    losses = [*USUAL, 1.0, 5.0, 5.0, 5.0, 5.0]
    assert [spike_begins(losses[:n], RULE) for n in range(9, 14)] == [False, False, True, False, False]


def test_a_constant_loss_may_vary_a_little():
    assert not is_spike([1.0] * 8 + [1.005] * 2, RULE)
    assert is_spike([1.0] * 8 + [1.007] * 2, RULE)


def test_samples_follow_each_other_over_any_rewinds(tmp_path):
    rewinds = Rewinds()
    consumed = []  # (first sample, step) of every step that was ever done, 8 samples each

    def steps(first, last):
        consumed.extend((step - 1) * 8 + rewinds.skipped_samples(step) for step in range(first, last + 1))

    steps(1, 57)
    rewinds.add(57, 50, 8)
    steps(51, 54)
    rewinds.add(54, 40, 8)  # the checkpoint of step 50 was damaged
    steps(41, 66)
    rewinds.add(66, 60, 8)
    steps(61, 70)
    assert consumed == list(range(0, 8 * len(consumed), 8))
    assert [rewinds.skipped_samples(step) for step in (40, 41, 60)] == [0, 21 * 8, 21 * 8]
    path = tmp_path / "rewinds.json"
    rewinds.write(path)
    assert Rewinds.read(path).entries == rewinds.entries
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(BitLMError, match="rewinds version 2, not"):
        Rewinds.read(path)
    path.write_text("{")
    with pytest.raises(BitLMError, match="cannot read .*rewinds.json"):
        Rewinds.read(path)


# 8 samples a step: steps 13 and 14 are steep, which step 14 sees; the checkpoint before is that of step 10.
STEEP = Faults(steep_samples=(97, 105))
SETTINGS = {
    "training__num_steps": 24,
    "checkpoint__interval_steps": 5,
    "checkpoint__keep_last": 9,
    "validation__interval_steps": 0,
    "anomalies": {"spike_window_steps": 8, "spike_patience_steps": 2, "spike_action": "rewind"},
}
SKIPPED = (14 - 10) * 8


def tensors(directory):
    return checkpoint_tensors(directory, 24)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture(scope="module")
def rewound(tmp_path_factory, dataset):
    directory = tmp_path_factory.mktemp("rewound") / "run"
    with injected(STEEP):
        assert train(directory, dataset, **SETTINGS).finished
    return directory


def test_a_rewound_run_is_one_whose_data_was_skipped(tmp_path, dataset, rewound, monkeypatch):
    """The reference knows no rewinds: its data is shifted from step 11 on."""
    plain = {**SETTINGS, "anomalies": {"spike_action": "off"}}
    train(tmp_path / "run", dataset, **plain, training__stop_after_steps=10)
    loader = Session.loader
    monkeypatch.setattr(Session, "loader", lambda self, consumed, extra: loader(self, consumed + SKIPPED, SKIPPED))
    train(tmp_path / "run", dataset, **plain)
    expected = read_metrics(tmp_path / "run")
    assert [record.pop("skipped_samples") for record in expected] == [0] * 24
    found = read_metrics(rewound)
    assert [record.pop("skipped_samples") for record in found] == [0] * 10 + [SKIPPED] * 14
    assert found == expected
    assert_same(tensors(rewound), tensors(tmp_path / "run"))


def test_what_was_taken_back_is_kept_and_recorded(rewound):
    lines = (rewound / "rewinds" / "rewind_1.jsonl").read_text().splitlines()
    taken_back = [json.loads(line) for line in lines]
    assert [record["step"] for record in taken_back] == [11, 12, 13, 14]
    assert taken_back[2]["loss"] > 5 * taken_back[1]["loss"]
    stored = json.loads((rewound / "rewinds" / "rewinds.json").read_text())
    assert stored["rewinds"] == [{"from_step": 14, "to_step": 10, "skipped_samples": SKIPPED}]
    for step, expected in ((10, []), (15, stored["rewinds"])):
        meta = json.loads((rewound / "checkpoints" / f"step_{step:08d}" / "meta.json").read_text())
        assert meta["rewinds"] == expected


def train_in_a_process(config, faults):
    run_with_faults([0], [config], [faults])


@pytest.mark.parametrize("step", [18])
def test_a_kill_after_a_rewind_changes_nothing(tmp_path, dataset, rewound, step):
    directory = tmp_path / "run"
    config = run_config(directory, dataset, **SETTINGS)
    process = multiprocessing.get_context("forkserver").Process(target=train_in_a_process, args=(config, STEEP))
    process.start()
    assert kill_at_step(process, directory, step) == -signal.SIGKILL
    assert (directory / "rewinds" / "rewinds.json").exists()
    with injected(STEEP):
        train(directory, dataset, **SETTINGS)
    assert read_metrics(directory) == read_metrics(rewound)
    assert_same(tensors(directory), tensors(rewound))
    assert not (directory / "rewinds" / "rewind_2.jsonl").exists()


def test_a_kill_in_the_middle_of_a_rewind_changes_nothing(tmp_path, dataset, rewound, monkeypatch):
    """The rewind is written down, but the checkpoint of a spiked step and its records are still there."""
    directory, every = tmp_path / "run", {**SETTINGS, "checkpoint__interval_steps": 2}
    with injected(STEEP), monkeypatch.context() as patch:
        patch.setattr(Rewinds, "write", lambda self, path: (Rewinds_write(self, path), stop()))
        with pytest.raises(KeyboardInterrupt):
            train(directory, dataset, **every)
    assert (directory / "checkpoints" / "latest").read_text() == "step_00000014\n"
    with injected(STEEP):
        train(directory, dataset, **every)
    names = {path.name for path in (directory / "checkpoints").iterdir()}
    assert {"step_00000012", "step_00000014.rewound_1", "step_00000014", "step_00000024"} <= names
    [entry] = json.loads((directory / "rewinds" / "rewinds.json").read_text())["rewinds"]
    assert entry == {"from_step": 14, "to_step": 12, "skipped_samples": 16}
    assert [record["skipped_samples"] for record in read_metrics(directory)] == [0] * 12 + [16] * 12


Rewinds_write = Rewinds.write


def stop():
    raise KeyboardInterrupt


def test_two_ranks_rewind_together(tmp_path, dataset, rewound):
    parallel = {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}
    config = run_config(tmp_path / "run", dataset, **SETTINGS, **parallel)
    assert run_ranks(run_with_faults, 2, [free_port()], [config], [STEEP]) == [[None]] * 2
    found, expected = read_metrics(tmp_path / "run"), read_metrics(rewound)
    assert [r["skipped_samples"] for r in found] == [r["skipped_samples"] for r in expected]
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=1e-4)


def test_a_run_that_jumps_again_ends(tmp_path, dataset, capsys):
    # After the rewind step 11 has the samples from 112 on: the second spike is in steps 13 and 14 again.
    again = Faults(steep_samples=(*STEEP.steep_samples, 129, 137))
    settings = {**SETTINGS, "anomalies": {**SETTINGS["anomalies"], "max_rewinds": 1}}
    with injected(again), pytest.raises(DivergedError, match=r"step 14: the loss jumped again after 1 rewinds"):
        train(tmp_path / "run", dataset, **settings)
    assert "rewind 1: from step 14 back to the checkpoint of step 10" in capsys.readouterr().err
    with injected(again), pytest.raises(DivergedError, match="jumped again"):  # and does so whenever it is started
        train(tmp_path / "run", dataset, **settings)


def test_without_a_checkpoint_or_the_wish_there_is_a_warning_only(tmp_path, dataset, capsys):
    for action, extra in (("warn", 0), ("rewind", 1)):
        settings = {**SETTINGS, "checkpoint__interval_steps": 0, "training__num_steps": 16}
        settings["anomalies"] = {**SETTINGS["anomalies"], "spike_action": action}
        with injected(STEEP):
            assert train(tmp_path / action, dataset, **settings).finished
        said = capsys.readouterr().err
        assert said.count("step 14: the loss has been far above the usual for 2 steps") == 1
        assert said.count("no checkpoint before the spike") == extra
        assert read_metrics(tmp_path / action)[-1]["skipped_samples"] == 0


def test_a_lost_file_of_rewinds_is_noticed(tmp_path, dataset, rewound):
    import shutil

    shutil.copytree(rewound, tmp_path / "run")
    (tmp_path / "run" / "rewinds" / "rewinds.json").unlink()
    with pytest.raises(BitLMError, match="comes after 1 rewinds, but .*rewinds.json tells of 0"):
        train(tmp_path / "run", dataset, **SETTINGS)
    assert Rewind(14, 10, SKIPPED) in Rewinds.read(rewound / "rewinds" / "rewinds.json").entries
