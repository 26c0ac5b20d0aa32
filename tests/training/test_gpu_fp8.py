"""FP8 training on a GPU follows bf16 training, resumes, and leaves checkpoints that plain layers load."""

import pytest

from megatron_bitlm.inference.load import loaded_model
from tests.training.fp8_runs import FP8_RUN, RECIPES, fp8_overrides
from tests.training_runs import read_metrics, train

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def transformer_engine():
    pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")


def mean_loss(records: list[dict], last: int) -> float:
    return sum(record["loss"] for record in records[-last:]) / last


@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_follows_bf16_over_some_hundred_steps(tmp_path, dataset, recipe) -> None:
    length = {"training__num_steps": 300, "validation__interval_steps": 300}
    train(tmp_path / "bf16", dataset, **FP8_RUN, **length)
    train(tmp_path / "fp8", dataset, **fp8_overrides(recipe), **length)
    bf16, fp8 = read_metrics(tmp_path / "bf16"), read_metrics(tmp_path / "fp8")
    assert mean_loss(bf16, 50) < 0.8 * bf16[0]["loss"]  # it learned, so there is something to follow
    assert mean_loss(fp8, 50) == pytest.approx(mean_loss(bf16, 50), rel=3e-2)
    assert [record["loss"] for record in fp8] != [record["loss"] for record in bf16]  # FP8 was on
    assert fp8[-1]["validation/nats_per_token"] == pytest.approx(bf16[-1]["validation/nats_per_token"], rel=5e-2)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path, dataset, recipe) -> None:
    train(tmp_path / "whole", dataset, **fp8_overrides(recipe))
    train(tmp_path / "parts", dataset, **fp8_overrides(recipe, training__stop_after_steps=4))
    train(tmp_path / "parts", dataset, **fp8_overrides(recipe))
    whole, parts = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    assert [record["loss"] for record in parts] == pytest.approx([record["loss"] for record in whole], rel=1e-3)


def test_a_head_computed_again_in_backward_changes_nothing(tmp_path, dataset) -> None:
    for name, again in (("kept", False), ("again", True)):
        train(tmp_path / name, dataset, **fp8_overrides("tensorwise", model__head__activation_checkpointing=again))
    kept, again = read_metrics(tmp_path / "kept"), read_metrics(tmp_path / "again")
    assert [record["loss"] for record in again] == pytest.approx([record["loss"] for record in kept], rel=1e-3)


def test_accumulation_fused_into_the_products_equals_one_large_batch(tmp_path, dataset) -> None:
    for name, rows in (("whole", 8), ("parts", 2)):
        train(tmp_path / name, dataset, **FP8_RUN, training__micro_batch_size=rows)
    whole, parts = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    for one, other in zip(whole, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=5e-2)


def test_the_checkpoint_loads_without_fp8(tmp_path, dataset) -> None:
    train(tmp_path / "run", dataset, **fp8_overrides("tensorwise"))
    with loaded_model(tmp_path / "run") as loaded:
        assert loaded.step == 12 and all(parameter.isfinite().all() for parameter in loaded.model.parameters())
