"""Counted FLOPs against those that torch's counter sees in a real forward and backward pass."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_bitlm.method.attention import block_causal_mask
from megatron_bitlm.method.attention_layout import BlockCausalLayout
from megatron_bitlm.method.head import HeadConfig
from megatron_bitlm.model.build import ModelConfig
from megatron_bitlm.model.flops import mean_visible_keys, token_flops
from megatron_bitlm.training.flops import run_flops
from tests.planning.models import (
    SEQUENCE_LENGTH,
    VOCAB_SIZE,
    as_softmax,
    build,
    loss_function,
    small_run,
    started,
    with_head,
)


def counted_per_token(config) -> float:
    """FLOPs of a step of a real model, attention spelled out in products that torch counts (all S x S scores)."""
    config = replace(config, model=replace(config.model, attention_backend="dense"))
    with started(config) as state:
        model = build(config, state)
        loss = loss_function(config, model)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss().backward()
    return counter.get_total_flops() / (config.training.micro_batch_size * SEQUENCE_LENGTH)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"conditioning": "mix"}], ids=["slot", "mix"])
def test_flops_are_those_that_torch_counts_in_a_real_step(copies, settings):
    """With every key visible, as torch counts; left over is the null condition, one block a micro-batch."""
    config = with_head(small_run(copies=copies), **settings)
    flops = token_flops(config.model, VOCAB_SIZE, copies, visible_keys=SEQUENCE_LENGTH)
    assert flops.total == pytest.approx(counted_per_token(config), rel=0.005)


def test_an_embedding_table_costs_nothing():
    config = small_run()
    config = replace(config, model=replace(config.model, input="embedding"))
    flops = token_flops(config.model, VOCAB_SIZE, 1, visible_keys=SEQUENCE_LENGTH)
    assert flops.input == 0
    assert flops.total == pytest.approx(counted_per_token(config), rel=0.005)


@pytest.mark.parametrize("tie", [False, True])
def test_a_softmax_costs_its_output_layer(tie):
    """6 V D; four rows pad the table to 504, 0.8% more of it."""
    config = as_softmax(small_run(), make_vocab_size_divisible_by=8, tie_embeddings=tie)
    flops = token_flops(config.model, VOCAB_SIZE, 1, visible_keys=SEQUENCE_LENGTH)
    assert flops.head == 6 * VOCAB_SIZE * 96 and flops.input == 0
    assert flops.total == pytest.approx(counted_per_token(config), rel=0.005)
    assert run_flops(config, VOCAB_SIZE).attention == flops.attention * (SEQUENCE_LENGTH + 1) / 2 / SEQUENCE_LENGTH


@pytest.mark.parametrize("block_size", [1, 4])
def test_attention_counts_the_keys_that_are_seen(block_size):
    """(S + m) / 2 of the S keys, which is the share of the mask that is set."""
    mask = block_causal_mask(BlockCausalLayout.build(1, SEQUENCE_LENGTH, block_size), torch.device("cpu"))
    visible = mean_visible_keys(SEQUENCE_LENGTH, block_size)
    assert visible == mask.sum().item() / SEQUENCE_LENGTH
    model = ModelConfig()
    every, seen = (token_flops(model, VOCAB_SIZE, 1, keys).attention for keys in (SEQUENCE_LENGTH, visible))
    assert seen == pytest.approx(every * mask.float().mean().item())


@pytest.mark.parametrize(
    ("preset", "head", "softmax_share"),
    [("0.6B", "paper", 0.88), ("1.7B", "paper", 0.98), ("4B", "paper", 1.01), ("8B", "paper", 1.06)]
    + [("0.6B", "narrow", 0.75), ("1.7B", "narrow", 0.84), ("4B", "narrow", 0.91), ("8B", "narrow", 0.93)],
)
def test_presets_cost_what_a_softmax_model_costs_about(preset, head, softmax_share):
    """Against 6 (P + V D) FLOPs of a softmax model on the same backbone, without attention."""
    model = ModelConfig(preset=preset, head=HeadConfig(preset=head))
    backbone = model.resolve_backbone()
    flops = token_flops(model, 151_669, 1, visible_keys=0)
    softmax = 6 * (backbone.num_matrix_parameters + 151_936 * backbone.hidden_size)
    assert (flops.matrices + flops.head) / softmax == pytest.approx(softmax_share, abs=0.03)
