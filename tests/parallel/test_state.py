"""Layouts are checked before anything starts, and a single process starts without an environment."""

import pytest
import torch
import torch.distributed as dist

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.model.presets import backbone_preset
from megatron_bitlm.parallel import state as state_module
from megatron_bitlm.parallel.state import ParallelConfig, initialize_parallel, launched_world_size, shutdown_parallel

TINY = backbone_preset("tiny")


@pytest.mark.parametrize(
    ("settings", "world_size", "message"),
    [
        ({"tensor_model_parallel_size": 0}, 1, "tensor_model_parallel_size is 0"),
        ({"tensor_model_parallel_size": 2}, 3, "3 processes cannot be divided .* start a multiple of 2"),
        ({"tensor_model_parallel_size": 4}, 4, "is 4, which does not divide the model's num_query_groups, 2"),
        ({"tensor_model_parallel_size": 3}, 3, "is 3, which does not divide .* ffn_hidden_size, 512"),
        ({"context_parallel_size": 2}, 3, "context 2 = 2 processes; start a multiple of 2"),
        ({"sequence_parallel": True}, 1, "sequence_parallel is on"),
        ({"overlap_param_gather": True}, 1, "overlap_param_gather is on"),
        ({"recompute": "full", "recompute_num_layers": 0}, 1, "recompute_num_layers is 0"),
        ({"pipeline_model_parallel_size": 3}, 3, "4 layers cannot be spread over 3 pipeline stages"),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_in_last_pipeline_stage": 5},
            2,
            "4 layers cannot be spread over 2 pipeline stages with 5 in the last",
        ),
        ({"num_layers_in_first_pipeline_stage": 2}, 1, "pipeline_model_parallel_size is 1"),
        ({"recompute": "selective", "recompute_modules": ("moe",)}, 1, "recompute_modules is .'moe'.; choose from"),
        ({"recompute": "selective", "recompute_modules": ()}, 1, "recompute_modules is "),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_in_last_pipeline_stage": 0},
            2,
            "num_layers_in_last_pipeline_stage is 0; give 1 or more",
        ),
        (
            {"pipeline_model_parallel_size": 3, "num_layers_in_first_pipeline_stage": 4},
            3,
            "4 layers cannot be spread over 3 pipeline stages with 4 in the first",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 3,
                "pipeline_model_parallel_layout": "Ettt|tL",
            },
            2,
            "already says the layers of every stage",
        ),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3},
            2,
            "virtual_pipeline_model_parallel_size is 3, which does not divide",
        ),
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 1}, 2, "give 2 or more"),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|ttL"},
            2,
            "'Et|ttL' does not fit",
        ),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|t|t|tL"},
            2,
            "describes 2 chunks a rank",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_named(settings, world_size, message):
    with pytest.raises(BitLMError, match=message.replace("|", r"\|")):
        ParallelConfig(**settings).validate(world_size, TINY)


@pytest.mark.parametrize(
    ("settings", "world_size"),
    [
        ({}, 1),
        ({}, 7),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 4),
        ({"pipeline_model_parallel_size": 2, "num_layers_in_last_pipeline_stage": 1}, 2),
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, 2),
        ({"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tttL"}, 2),
        ({"overlap_grad_reduce": True, "overlap_param_gather": True}, 2),
        ({"context_parallel_size": 2, "tensor_model_parallel_size": 2}, 4),
    ],
)
def test_layouts_that_fit(settings, world_size):
    ParallelConfig(**settings).validate(world_size, TINY)


def test_the_interleaved_schedule_takes_whole_rounds():
    config = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    config.validate_micro_batches(4)
    with pytest.raises(BitLMError, match="in rounds of 2, but a step has 3"):
        config.validate_micro_batches(3)
    ParallelConfig(pipeline_model_parallel_size=2).validate_micro_batches(3)


@pytest.mark.parametrize(
    ("settings", "length", "message"),
    [
        ({}, 30, "sequence_length 30 is not divisible by model.block_size 4"),
        ({"context_parallel_size": 2}, 24, "must be a multiple of 2 x 2 x 4 = 16, got 24"),
        ({"context_parallel_size": 3}, 40, "must be a multiple of 2 x 3 x 4 = 24, got 40"),
        (
            {"tensor_model_parallel_size": 4, "sequence_parallel": True},
            24,
            "over 4 ranks in whole blocks of 4, so data.sequence_length must be a multiple of 16, got 24",
        ),
        (
            {"tensor_model_parallel_size": 4, "context_parallel_size": 2, "sequence_parallel": True},
            48,
            "over 8 ranks in whole blocks of 4, so data.sequence_length must be a multiple of 32, got 48",
        ),
    ],
)
def test_a_sequence_that_does_not_divide_into_whole_blocks_is_named(settings, length, message):
    with pytest.raises(BitLMError, match=message):
        ParallelConfig(**settings).validate_sequence(length, 4)
    ParallelConfig(**settings).validate_sequence(96, 4)


def test_a_single_process_starts_without_an_environment_and_again():
    for seed in (1, 1, 2):
        state = initialize_parallel(ParallelConfig(), seed=seed)
        assert (state.rank, state.world_size, state.data_parallel_size) == (0, 1, 1)
        assert state.is_main and state.is_first_stage() and state.is_last_stage()
        assert state.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        total = torch.ones(3, device=state.device)
        dist.all_reduce(total, group=state.process_groups.dp)
        assert total.tolist() == [1, 1, 1]
        with pytest.raises(BitLMError, match="already running"):
            initialize_parallel(ParallelConfig(), seed=seed)
        shutdown_parallel()
    shutdown_parallel()
    assert not dist.is_initialized()


def test_a_bad_layout_leaves_nothing_running():
    with pytest.raises(BitLMError, match="1 processes cannot be divided"):
        initialize_parallel(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    assert not dist.is_initialized()


def test_seeds_are_repeatable():
    draws = []
    for _ in range(2):
        initialize_parallel(ParallelConfig(), seed=3)
        draws.append(torch.rand(3))
        shutdown_parallel()
    assert torch.equal(*draws)


def test_a_half_set_environment_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BitLMError, match="sets RANK, WORLD_SIZE but not MASTER_ADDR, MASTER_PORT"):
        launched_world_size()


def test_another_megatron_core_is_refused(monkeypatch):
    monkeypatch.setattr(state_module.megatron.core, "__version__", "0.17.1")
    with pytest.raises(
        BitLMError, match=r"megatron-core 0.17.1 is installed.*pip install 'megatron-core>=0.16.1,<0.17'"
    ):
        initialize_parallel(ParallelConfig(), seed=1)


def test_stages_of_chunks():
    config = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    common = {
        "config": config,
        "process_groups": None,
        "device": torch.device("cpu"),
        "world_size": 2,
        "tensor_parallel_rank": 0,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
    }
    places = [
        state_module.ParallelState(rank=rank, local_rank=rank, pipeline_parallel_rank=rank, **common)
        for rank in range(2)
    ]
    assert [[place.is_first_stage(chunk) for chunk in (0, 1)] for place in places] == [[True, False], [False] * 2]
    assert [[place.is_last_stage(chunk) for chunk in (0, 1)] for place in places] == [[False] * 2, [False, True]]
    assert [place.is_last_stage() for place in places] == [False, True]
    assert [place.virtual_stage(1) for place in places] == [1, 1]
