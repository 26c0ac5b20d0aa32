"""Steps that are not finite change nothing, on any rank of any layout; too many of them end the run with a reason."""

import json
import math

import pytest
import torch

from megatron_bitlm.cli import main
from megatron_bitlm.errors import BitLMError, DivergedError
from megatron_bitlm.training.anomalies import AnomalyConfig
from megatron_bitlm.training.diagnosis import Diagnosis, NonFiniteGradient
from tests.distributed_harness import free_port, run_ranks
from tests.training.faults import Faults, injected, run_with_faults
from tests.training_runs import checkpoint_tensors, read_metrics, run_config, train

NUM_STEPS = 6
SHORT = {
    "training__num_steps": NUM_STEPS,
    "training__micro_batch_size": 2,
    "validation__interval_steps": 0,
    "checkpoint__interval_steps": 0,
}
# Of the 8 samples of a step these are in step 3 and step 5.
BAD_SAMPLES = (17, 23, 36)
BAD_STEPS = (3, 5)
QKV = "layers.0.self_attention.linear_qkv.weight"
TENSOR, PIPELINE = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
LAYOUTS = {
    "TP2": {TENSOR: 2},
    "PP2": {PIPELINE: 2},
    "DP2": {"parallel__use_distributed_optimizer": False},
    "DP2 distributed optimizer": {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True},
}
SAMPLES = Faults(poisoned_samples=BAD_SAMPLES)
GRADIENT = Faults(poisoned_gradients={3: (1, QKV), 5: (1, QKV)})
LOST = Faults(lost_updates=BAD_STEPS)


def curve(directory):
    """Records without what a skipped step lacks."""
    return [
        {name: value for name, value in record.items() if name != "skipped_steps"}
        for record in read_metrics(directory)
        if record["step"] not in BAD_STEPS
    ]


def check_skipped(directory, reference):
    """The run skipped the bad steps, and is else the one in which these updated nothing."""
    records = read_metrics(directory)
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1, 2, 2]
    assert [record["gradient_norm"] is None for record in records] == [step in BAD_STEPS for step in range(1, 7)]
    assert curve(directory) == curve(reference)
    ours, theirs = checkpoint_tensors(directory, NUM_STEPS), checkpoint_tensors(reference, NUM_STEPS)
    assert ours.keys() == theirs.keys() and len(ours) > 50
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sorted(path.name for path in (directory / "diagnostics").iterdir()) == ["step_3.json", "step_5.json"]


def diagnosis(directory, step):
    return json.loads((directory / "diagnostics" / f"step_{step}.json").read_text())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, dataset):
    """Folders of the runs in every layout: with bad samples, with a bad gradient, with lost updates."""
    folder = tmp_path_factory.mktemp("two")
    runs = {
        (name, kind): folder / f"{name}_{kind}".replace(" ", "_")
        for name in LAYOUTS
        for kind in ("samples", "gradient", "lost")
    }
    configs = [run_config(path, dataset, **SHORT, **LAYOUTS[name]) for (name, _), path in runs.items()]
    faults = [{"samples": SAMPLES, "gradient": GRADIENT, "lost": LOST}[kind] for _, kind in runs]
    ends = run_ranks(run_with_faults, 2, [free_port() for _ in runs], configs, faults, timeout_s=300)
    assert ends == [[None] * len(runs)] * 2
    return runs


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_rank_takes_a_step_in_which_a_loss_is_not_finite(name, two_ranks):
    directory = two_ranks[name, "samples"]
    check_skipped(directory, two_ranks[name, "lost"])
    assert [record["loss"] is None for record in read_metrics(directory)] == [s in BAD_STEPS for s in range(1, 7)]
    for step, expected in ((3, [17, 23]), (5, [36])):
        found = diagnosis(directory, step)
        assert found["samples_with_non_finite_loss"] == expected
        assert found["samples"] == list(range(8 * (step - 1), 8 * step))
        assert found["loss"] == found["gradient_norm"] == "nan"


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_rank_takes_a_step_in_which_one_rank_has_an_infinite_gradient(name, two_ranks):
    directory = two_ranks[name, "gradient"]
    check_skipped(directory, two_ranks[name, "lost"])
    # The hook's rank holds the layer the hook is on; the second stage's first layer is the model's second.
    qkv = QKV.replace("layers.0", "layers.1") if name == "PP2" else QKV
    for step in BAD_STEPS:
        found = diagnosis(directory, step)
        [parameter] = found["parameters_with_non_finite_gradients"]
        assert parameter["name"] == f"decoder.{qkv}"
        assert 1 in parameter["ranks"] and parameter["num_elements"] > 0
        assert found["samples_with_non_finite_loss"] == [] and math.isfinite(found["loss"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_process_skips_and_goes_on_in_another_session(tmp_path, dataset, precision):
    settings = {**SHORT, "training__precision": precision}
    with injected(LOST):
        train(tmp_path / "lost", dataset, **settings)
    with injected(SAMPLES):
        for stop in (4, None):
            train(tmp_path / "cut", dataset, **settings, training__stop_after_steps=stop)
    check_skipped(tmp_path / "cut", tmp_path / "lost")


def test_too_many_in_a_row_end_the_run_with_a_diagnosis(tmp_path, dataset, capsys):
    directory = tmp_path / "run"
    config = {
        **SHORT,
        "training__num_steps": 12,
        "checkpoint__interval_steps": 4,
        "anomalies__max_consecutive_skips": 1,
    }
    bad = Faults(poisoned_samples=(9, 38, 45, 50))  # steps 2, 5, 6 and 7
    run_config(directory, dataset, **config)
    with injected(bad):
        assert main(["pretrain", str(tmp_path / "run.yaml")]) == DivergedError.exit_status == 65
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[2].strip() for line in said[:3]] == ["step 2", "step 5", "step 6"]
    assert len(said) == 4
    assert "2 steps in a row were not finite (anomalies.max_consecutive_skips 1)" in said[3]
    assert "the loss is not finite for samples 45;" in said[3]
    assert f"{directory}/diagnostics/step_6.json" in said[3]
    found = diagnosis(directory, 6)
    assert (found["format"], found["version"]) == ("megatron-bitlm-diagnosis", 1)
    assert found["parameters_with_non_finite_gradients"][0]["name"].startswith("head.output")
    assert found["parameters_with_non_finite_gradients"][-1]["name"].startswith("input_module.")
    assert [record["step"] for record in read_metrics(directory)] == [1, 2, 3, 4, 5, 6]
    assert (directory / "checkpoints" / "latest").read_text() == "step_00000004\n"
    train(directory, dataset, **config)  # the data is mended: the run goes on from its checkpoint
    assert read_metrics(directory)[-1]["skipped_steps"] == 1


def test_the_limit_counts_across_sessions(tmp_path, dataset):
    config = {**SHORT, "checkpoint__interval_steps": 1, "anomalies__max_consecutive_skips": 1}
    with injected(Faults(poisoned_samples=(9, 17))):  # steps 2 and 3
        train(tmp_path / "run", dataset, **config, training__stop_after_steps=2)
        with pytest.raises(DivergedError, match="2 steps in a row .* step 3: loss nan"):
            train(tmp_path / "run", dataset, **config)


def test_all_ranks_end_together(tmp_path, dataset):
    config = run_config(tmp_path / "run", dataset, **SHORT, **LAYOUTS["PP2"], anomalies__max_consecutive_skips=0)
    [[first], [second]] = run_ranks(run_with_faults, 2, [free_port()], [config], [SAMPLES])
    assert first == second and "not finite for samples 17, 23;" in first
    assert diagnosis(tmp_path / "run", 3)["samples_with_non_finite_loss"] == [17, 23]


def test_a_learning_rate_that_explodes_ends_the_run(tmp_path, dataset):
    with pytest.raises(DivergedError, match=r"3 steps in a row .*lower optimizer.learning_rate"):
        train(
            tmp_path / "run",
            dataset,
            optimizer__learning_rate=1e30,
            optimizer__warmup_steps=0,
            optimizer__clip_grad=0.0,
            checkpoint__interval_steps=0,
            anomalies__max_consecutive_skips=2,
        )


def test_a_long_list_is_cut_in_the_sentence_only(tmp_path):
    gradients = [NonFiniteGradient("head.output.weight", list(range(16)), 3), NonFiniteGradient("x", [1], 1)]
    found = Diagnosis(7, math.inf, math.nan, gradients, list(range(100)), [])
    text = found.sentence()
    assert "rank 0, 1, 2, 3, 4, 5, 6, 7, ... (16 in all) and of 1 parameters after it" in text
    assert "samples 0-99 is finite" in text
    found.write(tmp_path / "d.json")
    content = json.loads((tmp_path / "d.json").read_text())
    assert content["parameters_with_non_finite_gradients"][0]["ranks"] == list(range(16))
    assert content["loss"] == "inf"


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_consecutive_skips", -1, "at least 0"),
        ("spike_window_steps", 1, "at least 2"),
        ("spike_patience_steps", 0, "at least 1"),
        ("max_rewinds", -2, "at least 0"),
        ("spike_threshold", math.nan, "positive"),
        ("spike_action", "panic", "off, warn or rewind"),
    ],
)
def test_settings_out_of_range_are_named(name, value, rule):
    with pytest.raises(BitLMError, match=f"anomalies.{name} must be {rule}, got '?{value}"):
        AnomalyConfig(**{name: value}).validate()
