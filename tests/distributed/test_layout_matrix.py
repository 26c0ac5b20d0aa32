"""Ten optimiser steps of every layout are those of one process; see docs/parallelism.md for the figures."""

import pytest
import torch

from tests.distributed.layout_matrix import (
    BF16_NAMES,
    NAMES,
    NUM_STEPS,
    ONE,
    STOPPED,
    STOPPED_STEP,
    largest_differences,
    reference_of,
    run_directory,
    run_matrix,
)
from tests.training_runs import checkpoint_tensors

TOLERANCE = 1e-5
# Rounding to bf16 depends on the order of sums.
BF16_TOLERANCE = {"loss": 1e-4, "validation/nats_per_token": 1e-4, "gradient_norm": 1e-2}
GOLDEN_LAYOUT = "TP2 x PP2"
GOLDEN_LOSSES = [
    1.0, 0.99504077, 0.983038553, 0.968812016, 0.952909215,
    0.939022386, 0.92780209, 0.920498122, 0.914324044, 0.912387756,
]  # fmt: skip
GOLDEN_NORMS = [
    0.715774056, 0.736087831, 0.869117891, 1.00907015, 1.16537698,
    1.27765561, 1.3467952, 1.37141901, 1.418296, 1.40821252,
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def records(folder) -> dict:
    torch.set_num_threads(1)
    return run_matrix(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_trains_the_curve_of_one_process(name, records):
    for figure, difference in largest_differences(records[name], records[ONE]).items():
        assert difference < TOLERANCE, figure
    for ours, theirs in zip(records[name], records[ONE], strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["invalid_code_rate"] == pytest.approx(theirs["invalid_code_rate"], rel=1e-5)


@pytest.mark.parametrize("name", BF16_NAMES)
def test_in_bf16_a_layout_stays_near_one_process(name, records):
    found = largest_differences(records[name], records[reference_of(name)])
    for figure, tolerance in BF16_TOLERANCE.items():
        assert found[figure] < tolerance, figure


def test_the_golden_curve(records):
    """Figures of an earlier version: a change that moves them changes every run that is resumed or repeated."""
    assert [record["loss"] for record in records[GOLDEN_LAYOUT]] == pytest.approx(GOLDEN_LOSSES, rel=TOLERANCE)
    assert [record["gradient_norm"] for record in records[GOLDEN_LAYOUT]] == pytest.approx(GOLDEN_NORMS, rel=TOLERANCE)


def test_the_curve_goes_down(records):
    """Ten steps in which something is learned, by backbone and head."""
    losses = [record["loss"] for record in records[ONE]]
    assert losses[-1] < 0.95 * losses[0]
    assert all(record["gradient_norm/backbone"] > 0 for record in records[ONE][1:])


def assert_same_model(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], num_steps: int) -> None:
    """The model's tensors of two checkpoints, by their names in the whole model."""
    names = {name for name in theirs if not name.startswith("optimizer")}
    assert names == {name for name in ours if not name.startswith("optimizer")} and len(names) > 30
    for name in names:
        # The bias of the keys has no gradient but rounding, of which Adam makes whole steps.
        bound = 2 * num_steps * 1e-3 if name.endswith("qkv.bias") else 2e-5
        assert (ours[name] - theirs[name]).abs().max() < bound, name


@pytest.mark.parametrize("name", NAMES)
def test_the_last_checkpoint_of_a_layout_holds_the_model_of_one_process(name, records, folder):
    ours, theirs = (checkpoint_tensors(run_directory(folder, run), NUM_STEPS) for run in (name, ONE))
    assert_same_model(ours, theirs, NUM_STEPS)


def test_a_checkpoint_holds_the_weights_of_its_step(records, folder):
    """Also where an update reaches the other ranks' weights only with the next training step."""
    ours = checkpoint_tensors(run_directory(folder, STOPPED), STOPPED_STEP)
    theirs = checkpoint_tensors(run_directory(folder, f"{ONE}, stopped"), STOPPED_STEP)
    assert records[STOPPED][-1]["step"] == STOPPED_STEP
    assert_same_model(ours, theirs, STOPPED_STEP)
