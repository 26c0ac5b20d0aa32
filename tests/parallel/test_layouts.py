"""Every layout of the backbone computes what one process does: weights, loss and gradients, in float64."""

import pytest
import torch

from megatron_bitlm.parallel.state import ParallelConfig
from tests.distributed_harness import free_port, run_ranks
from tests.parallel.layout_run import (
    SHAPE,
    Shard,
    load_beside_initial_weights,
    run_layouts,
    save_initial_weights,
)

TWO_RANKS = {
    "TP2": ParallelConfig(tensor_model_parallel_size=2),
    "TP2 SP": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "TP2 SP full recompute": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, recompute="full"),
    "PP2": ParallelConfig(pipeline_model_parallel_size=2),
    "PP2 VP2": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "PP2 uneven": ParallelConfig(pipeline_model_parallel_size=2, num_layers_in_last_pipeline_stage=1),
    "PP2 layout": ParallelConfig(pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et|tttL"),
    "DP2": ParallelConfig(),
    "CP2": ParallelConfig(context_parallel_size=2),
    "CP2 full recompute": ParallelConfig(context_parallel_size=2, recompute="full"),
}
FOUR_RANKS = {
    "TP2 PP2 SP": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
    "TP2 CP2 SP": ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2, sequence_parallel=True),
    "PP2 CP2 VP2": ParallelConfig(
        pipeline_model_parallel_size=2, context_parallel_size=2, virtual_pipeline_model_parallel_size=2
    ),
    "CP4": ParallelConfig(context_parallel_size=4),
}


def run(layouts: dict[str, ParallelConfig], world_size: int) -> dict[str, list]:
    ports = [free_port() for _ in layouts]
    by_rank = run_ranks(run_layouts, world_size, ports, list(layouts.values()))
    return {name: [results[i] for results in by_rank] for i, name in enumerate(layouts)}


@pytest.fixture(scope="module")
def one_process() -> tuple[float, dict[str, Shard]]:
    [(loss, shards)] = run({"one": ParallelConfig()}, 1)["one"]
    return loss, {shard.name: shard for shard in shards}


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, list]:
    return run(TWO_RANKS, 2)


@pytest.fixture(scope="module")
def four_ranks() -> dict[str, list]:
    return run(FOUR_RANKS, 4)


def assembled(name: str, parts: list[torch.Tensor], full: torch.Tensor) -> torch.Tensor:
    """The whole tensor from the tensor-parallel ranks' shards in order, by the rules of the matrices."""
    if parts[0].shape == full.shape:
        for part in parts[1:]:
            torch.testing.assert_close(part, parts[0], rtol=0, atol=1e-12, msg=f"{name} differs between ranks")
        return parts[0]
    if name.endswith("linear_fc1.weight"):
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(parts, 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0)


def check(results: list, reference: tuple[float, dict[str, Shard]]) -> None:
    loss, expected = reference
    losses = [result for result, _ in results if result is not None]
    assert losses and losses == pytest.approx([loss] * len(losses), rel=1e-12)
    shards = [shard for _, rank_shards in results for shard in rank_shards]
    assert {shard.name for shard in shards} == set(expected)
    for name, whole in expected.items():
        parts = {s.tensor_parallel_rank: s for s in shards if s.name == name}
        ordered = [parts[rank] for rank in sorted(parts)]
        value = assembled(name, [part.value for part in ordered], whole.value)
        assert torch.equal(value, whole.value), name
        gradient = assembled(name, [part.gradient for part in ordered], whole.gradient)
        assert whole.gradient.abs().max() > 0, name
        error = (gradient - whole.gradient).abs().max() / whole.gradient.abs().max()
        assert error < 1e-11, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_equal_one(name, two_ranks, one_process):
    check(two_ranks[name], one_process)


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks_equal_one(name, four_ranks, one_process):
    check(four_ranks[name], one_process)


def test_the_comparison_covers_every_layer(one_process):
    names = set(one_process[1])
    assert {f"decoder.layers.{i}.mlp.linear_fc2.weight" for i in range(SHAPE.num_layers)} <= names
    assert len(names) == 8 * SHAPE.num_layers + 1 + 4


def test_checkpoints_cut_weights_as_initialisation_does(tmp_path):
    """What tensor-parallel ranks write is, reassembled by megatron-core, the initial model of one process."""
    layout = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    run_ranks(save_initial_weights, 2, layout, str(tmp_path))
    [pairs] = run_ranks(load_beside_initial_weights, 1, str(tmp_path))
    assert len(pairs) == 8 * SHAPE.num_layers + 1 + 4
    for name, loaded, initial in pairs:
        assert torch.equal(loaded, initial), name
