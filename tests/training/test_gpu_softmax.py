"""The softmax baseline on a GPU: plain and Transformer Engine layers, both cross-entropies, cached generation."""

import pytest

from megatron_bitlm.inference.generate import TokenGenerator
from megatron_bitlm.inference.load import loaded_model
from megatron_bitlm.method.token_sampling import TokenSamplerConfig
from tests.training_runs import read_metrics, train

pytestmark = pytest.mark.gpu

SOFTMAX = {"model__output": "softmax", "optimizer__learning_rate": 1e-2, "training__num_steps": 30}
LOCAL, FUSED = {"model__implementation": "local"}, {"model__implementation": "transformer_engine"}
# Widths that are multiples of 128 keep every kernel happy, FP8's too.
WIDE = {"model__backbone": {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 256, "head_dim": 64}}


def records(tmp_path, dataset, name: str, **overrides) -> list[dict]:
    train(tmp_path / name, dataset, **{**SOFTMAX, **overrides})
    return read_metrics(tmp_path / name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_and_attention_backends_agree(tmp_path, dataset, precision) -> None:
    common = {"training__precision": precision, **LOCAL}
    dense = records(tmp_path, dataset, "dense", model__attention_backend="dense", **common)
    auto = records(tmp_path, dataset, "auto", **common)
    assert auto[-1]["loss"] < 0.8 * auto[0]["loss"]
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for one, other in zip(dense, auto, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=tolerance)


@pytest.mark.parametrize("tie", [False, True])
def test_transformer_engine_and_the_fused_cross_entropy_follow_plain_ones(tmp_path, dataset, tie) -> None:
    pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    common = {"training__precision": "bf16", "model__softmax": {"tie_embeddings": tie}, **WIDE}
    local = records(tmp_path, dataset, "local", **common, **LOCAL)
    fused = records(tmp_path, dataset, "fused", **common, **FUSED)
    assert fused[-1]["loss"] == pytest.approx(local[-1]["loss"], rel=3e-2)
    assert fused[-1]["validation/nats_per_token"] == pytest.approx(local[-1]["validation/nats_per_token"], rel=3e-2)


def test_generation_with_and_without_a_cache(tmp_path, dataset) -> None:
    records(tmp_path, dataset, "run", **LOCAL)
    with loaded_model(tmp_path / "run") as loaded:
        assert loaded.state.device.type == "cuda"
        for sampler in (TokenSamplerConfig(temperature=0), TokenSamplerConfig()):
            results = [
                TokenGenerator(loaded.model, sampler=sampler, cached=cached).generate(
                    [[1, 2, 3], []], max_new_tokens=16
                )
                for cached in (True, False)
            ]
            assert results[0] == results[1]
