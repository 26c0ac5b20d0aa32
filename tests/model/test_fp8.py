"""FP8: which settings reach megatron-core, what is refused, and that Transformer Engine's state stays out of files."""

from contextlib import contextmanager

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.models.gpt import gpt_layer_specs
from torch import nn

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.head import DiffusionHead, HeadConfig
from megatron_bitlm.model.backbone import transformer_config
from megatron_bitlm.model.build import BackboneOverrides, ModelConfig, build_chunks, unwrap
from megatron_bitlm.model.checkpoint import model_state
from megatron_bitlm.model.fp8 import Fp8Config, require_fp8
from megatron_bitlm.model.presets import backbone_preset
from megatron_bitlm.parallel.state import ParallelConfig, initialize_parallel, shutdown_parallel
from megatron_bitlm.training.config import RunConfig
from tests.training.fp8_runs import RECIPES, fp8_overrides
from tests.training_runs import run_config

SHAPE = backbone_preset("tiny")


def settings(**changes) -> RunConfig:
    """A valid FP8 run, and one setting changed by its dotted name."""
    config = RunConfig()
    config.training.precision, config.training.fp8.recipe = "bf16", "tensorwise"
    for name, value in changes.items():
        *path, last = name.split("__")
        target = config
        for part in path:
            target = getattr(target, part)
        setattr(target, last, value)
    return config


def test_a_valid_run_passes_and_none_asks_for_nothing():
    settings().validate()
    assert Fp8Config().megatron_settings() == {}
    assert transformer_config(SHAPE, ParallelConfig(), precision="bf16", fp8=Fp8Config()).fp8 is None


@pytest.mark.parametrize(
    ("recipe", "start", "end", "kept"),
    [("tensorwise", 1, 1, {0, 3}), ("blockwise", 2, 0, {0, 1}), ("delayed", 0, 0, ())],
)
def test_megatron_keeps_the_layers_that_were_named_in_bf16(recipe, start, end, kept):
    fp8 = Fp8Config(recipe, "e4m3", num_bf16_layers_at_start=start, num_bf16_layers_at_end=end, amax_history_length=7)
    config = transformer_config(SHAPE, ParallelConfig(), precision="bf16", fp8=fp8)
    assert (config.fp8, config.fp8_recipe, config.fp8_amax_history_len) == ("e4m3", recipe, 7)
    assert {layer for layer in range(4) if is_first_last_bf16_layer(config, layer)} == set(kept)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training__precision": "fp32"}, "training.precision is fp32; FP8 goes with bf16"),
        ({"training__fp8__recipe": "delayed"}, "set num_bf16_layers_at_start and num_bf16_layers_at_end to 0"),
        ({"training__fp8__recipe": "mxfp8"}, "must be none, delayed, tensorwise or blockwise, got 'mxfp8'"),
        ({"training__fp8__num_bf16_layers_at_end": 5}, r"must lie in 0..4.*got 5"),
        ({"training__fp8__weight_gradient": False}, "goes with recipe delayed only, got tensorwise"),
        ({"training__fp8__amax_history_length": 0}, "amax_history_length must be at least 1, got 0"),
        ({"model__head__width": 24}, "1.5 x model.head.width is 36.*multiples of 16|model.head.width is 24"),
        ({"model__backbone__ffn_hidden_size": 200}, "ffn_hidden_size is 200"),
        ({"data__sequence_length": 12, "training__micro_batch_size": 2}, "data.sequence_length of a rank is 24"),
    ],
)
def test_what_fp8_cannot_do_is_refused_by_name(changes, words):
    with pytest.raises(BitLMError, match=words):
        settings(**changes).validate()


def test_delayed_scaling_refuses_a_recomputed_head():
    config = settings(training__fp8__recipe="delayed", model__head__activation_checkpointing=True)
    config.training.fp8.num_bf16_layers_at_start = config.training.fp8.num_bf16_layers_at_end = 0
    with pytest.raises(BitLMError, match="history of training.fp8.recipe delayed"):
        config.validate()
    config.training.fp8.head = False
    config.validate()


def test_fp8_without_transformer_engine_is_refused():
    if gpt_layer_specs.HAVE_TE:
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(BitLMError, match="Transformer Engine is not installed; .*megatron-bitlm.cuda."):
        require_fp8(Fp8Config("tensorwise"), "local")
    require_fp8(Fp8Config(), "local")


def test_a_recomputed_head_runs_in_the_same_context_again():
    entered = []

    @contextmanager
    def note():
        entered.append(torch.is_grad_enabled())
        yield

    config = HeadConfig(width=16, num_layers=2, head_dim=8, activation_checkpointing=True, adaln_init_std=0.5)
    head = DiffusionHead(config, num_bits=6, block_size=2, condition_size=8, recompute_context=note)
    nn.init.normal_(head.output.weight)
    loss = head(torch.randn(3, 2, 6), torch.rand(3), torch.randn(3, 2, 8)).square().sum()
    assert not entered
    loss.backward()
    assert len(entered) == config.num_layers


class StatefulLinear(nn.Linear):
    """A linear with a state of its own beside the weights, as Transformer Engine's."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([1, 2, 3], dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        raise AssertionError("such a state must not be loaded")


def test_layers_own_state_is_neither_written_nor_missed():
    state = initialize_parallel(ParallelConfig(), seed=0)
    try:
        shape = BackboneOverrides(2, 32, 64, 4, 2, head_dim=8)
        config = ModelConfig(backbone=shape, head=HeadConfig(width=16, num_layers=2, head_dim=8))
        built = build_chunks(config, state, code=BinaryCode(20), bos_id=18, eos_id=19, precision="fp32", seed=1)
        model = unwrap(built[0])
        model.head.layers[0].down = StatefulLinear(24, 16)
        assert any(name.endswith("_extra_state") for name in model.state_dict())
        written = model_state([model])["model"]
        assert "head.layers.0.down.weight" in written
        assert not [name for name in written if "_extra_state" in name]
        values = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_extra_state")}
        model.load_state_dict(values, strict=True)
        del values["head.layers.0.down.weight"]
        with pytest.raises(RuntimeError, match="head.layers.0.down.weight"):
            model.load_state_dict(values, strict=True)
    finally:
        shutdown_parallel()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_settings_of_the_tests_on_a_gpu_are_valid(recipe, tmp_path):
    config = run_config(tmp_path / "run", "data", **fp8_overrides(recipe))
    config.validate()
    assert config.training.fp8.recipe == recipe
