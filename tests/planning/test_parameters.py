"""Counted parameters against those of real models."""

from dataclasses import replace

import pytest
import torch

from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.head import HeadConfig
from megatron_bitlm.model.backbone import block_spec, transformer_config
from megatron_bitlm.model.bitlm import BitLM
from megatron_bitlm.model.build import ModelConfig, build_input
from megatron_bitlm.planning.parameters import parameter_sizes
from tests.planning.models import VOCAB_SIZE, as_softmax, build, counts_by_part, small_run, started, with_head

QWEN3_VOCAB_SIZE = 151_669


@pytest.mark.parametrize(
    "changes",
    [{}, {"input": "embedding"}, {"head": HeadConfig(width=64, head_dim=32, conditioning="mix", slot_embedding=True)}],
    ids=["mlp", "embedding", "mix"],
)
def test_a_small_model_has_the_parameters_counted(changes):
    config = with_head(small_run())
    config = replace(config, model=replace(config.model, **changes))
    with started(config) as state:
        assert parameter_sizes(config.model, VOCAB_SIZE).counts() == counts_by_part(build(config, state))


@pytest.mark.parametrize("tie", [False, True])
def test_a_softmax_model_has_the_parameters_counted(tie):
    config = as_softmax(small_run(), tie_embeddings=tie)
    with started(config) as state:
        sizes = parameter_sizes(config.model, VOCAB_SIZE)
        assert sizes.counts() == counts_by_part(build(config, state))
    half = parameter_sizes(config.model, VOCAB_SIZE, 2)
    table = 512 // 2 * 96
    assert half.of_chunk(1, first=True, last=False)[0] == table
    # The last stage has its own table, or a copy of the first stage's.
    assert half.of_chunk(1, first=False, last=True)[-1] == table
    assert half.of_chunk(0, first=True, last=True).count(table) == (1 if tie else 2)


@pytest.mark.parametrize("preset", ["tiny", "0.6B", "1.7B", "4B", "8B"])
def test_every_preset_has_the_parameters_counted(preset, monkeypatch):
    monkeypatch.setattr("megatron_bitlm.model.bitlm.BlockCounter", lambda *_: None)  # computes, which meta cannot
    config = ModelConfig(preset=preset, head=HeadConfig(head_dim=64))
    backbone, code = config.resolve_backbone(), BinaryCode(QWEN3_VOCAB_SIZE)
    with started(small_run()) as state:
        megatron = transformer_config(backbone, state.config)
        with torch.device("meta"):
            model = BitLM(
                megatron,
                block_spec(megatron, block_size=config.block_size),
                code=code,
                head=config.head,
                block_size=config.block_size,
                bos_id=1,
                eos_id=2,
                input_module=build_input(config, code, backbone.hidden_size, torch.float32),
                backbone=backbone,
            )
        assert parameter_sizes(config, QWEN3_VOCAB_SIZE).counts() == counts_by_part(model)


def test_tensor_parallel_ranks_share_the_matrices_alone():
    model = ModelConfig(preset="8B")
    whole, half = (parameter_sizes(model, QWEN3_VOCAB_SIZE, ranks) for ranks in (1, 2))
    assert half.input == whole.input and half.head == whole.head
    matrices = model.resolve_backbone().num_matrix_parameters
    norms = whole.counts()["backbone"] - matrices
    assert half.counts()["backbone"] == matrices // 2 + norms
