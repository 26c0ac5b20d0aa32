"""Pipeline stages with the head's weight."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bitlm.method.head import HeadConfig
from megatron_bitlm.model.build import ModelConfig
from megatron_bitlm.model.flops import head_flops, token_flops
from megatron_bitlm.parallel.config import ParallelConfig
from megatron_bitlm.parallel.stages import layers_by_rank
from megatron_bitlm.planning.balance import balanced_counts, balanced_stages, layout_string, stage_balance

NUM_LAYERS = 36
BACKBONE = ModelConfig(preset="8B").resolve_backbone()


def layout(pipeline: int, virtual: int | None = None, **settings) -> ParallelConfig:
    return ParallelConfig(
        pipeline_model_parallel_size=pipeline, virtual_pipeline_model_parallel_size=virtual, **settings
    )


def test_the_head_of_8b_is_worth_five_and_a_half_layers():
    model = ModelConfig(preset="8B", head=HeadConfig(preset="paper"))
    flops = token_flops(model, 18, 1, visible_keys=1024)
    assert flops.head * NUM_LAYERS / (flops.matrices + flops.attention) == pytest.approx(5.5, abs=0.1)
    assert head_flops(model, 18, 4) == pytest.approx(4 * head_flops(model, 18, 1), rel=0.05)


@pytest.mark.parametrize(
    ("pipeline", "virtual", "last", "text", "imbalance"),
    [
        (2, None, 15, None, 1.01),
        (4, None, 3, None, 1.06),
        (8, None, None, "Et*6|(t*5|)*6L", 1.16),
        (2, 2, None, "Et*11|t*10|t*10|t*5L", 1.01),
    ],
)
def test_8b_with_a_head_of_five_and_a_half_layers(pipeline, virtual, last, text, imbalance):
    stages = balanced_stages(layout(pipeline, virtual), NUM_LAYERS, 5.5)
    assert stages.num_layers_in_last_pipeline_stage == last
    assert stages.pipeline_model_parallel_layout == text
    stages.validate(pipeline, BACKBONE)
    assert stage_balance(stages, NUM_LAYERS, 5.5, 0.0).imbalance == pytest.approx(imbalance, abs=0.005)


def test_stages_of_8b_in_layers():
    assert layers_by_rank(balanced_stages(layout(2), NUM_LAYERS, 5.5), NUM_LAYERS) == [[21], [15]]
    assert layers_by_rank(balanced_stages(layout(4), NUM_LAYERS, 5.5), NUM_LAYERS) == [[11], [11], [11], [3]]
    assert layers_by_rank(layout(4, 3), NUM_LAYERS) == [[3, 3, 3]] * 4
    uneven = layout(4, num_layers_in_first_pipeline_stage=7, num_layers_in_last_pipeline_stage=9)
    assert layers_by_rank(uneven, NUM_LAYERS) == [[7], [10], [10], [9]]
    assert layers_by_rank(ParallelConfig(), NUM_LAYERS) == [[36]]


def test_what_was_set_before_gives_way():
    before = layout(2, num_layers_in_first_pipeline_stage=30, num_layers_in_last_pipeline_stage=6)
    assert layers_by_rank(balanced_stages(before, NUM_LAYERS, 5.5), NUM_LAYERS) == [[21], [15]]


def test_fewer_layers_than_chunks():
    assert balanced_stages(layout(8, 4), 28, 5.5) is None
    assert balanced_stages(layout(4), 3, 5.5) is not None  # the last stage holds the head alone


@given(
    num_chunks=st.integers(2, 12),
    num_layers=st.integers(12, 60),
    head_layers=st.floats(0, 30, allow_nan=False),
)
def test_no_spread_is_better(num_chunks, num_layers, head_layers):
    counts = balanced_counts(num_chunks, num_layers, head_layers)
    assert sum(counts) == num_layers and min(counts[:-1]) >= 1
    cost = max(*counts[:-1], counts[-1] + head_layers)
    # The least possible: with each last stage, the others hold at least their mean.
    least = min(
        max(-(-(num_layers - last) // (num_chunks - 1)), last + head_layers)
        for last in range(num_layers - num_chunks + 2)
    )
    assert cost == least


@given(counts=st.lists(st.integers(1, 9), min_size=4, max_size=12).filter(lambda counts: len(counts) % 4 == 0))
def test_layout_strings_say_what_they_were_made_from(counts):
    virtual = len(counts) // 4
    config = layout(4, virtual if virtual > 1 else None, pipeline_model_parallel_layout=layout_string(counts))
    ranks = layers_by_rank(config, sum(counts))
    assert [ranks[chunk % 4][chunk // 4] for chunk in range(len(counts))] == counts
