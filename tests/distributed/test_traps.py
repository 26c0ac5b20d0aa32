"""Ten traps of megatron-core that give wrong numbers without an error; each test fails when its trap is sprung.

docs/parallelism.md lists them. That all layouts train the same curve is tested in test_layout_matrix.py.
"""

import inspect

import pytest
import torch
from torch import nn

from megatron_bitlm.method.attention_layout import BlockCausalLayout
from megatron_bitlm.method.attention_shard import SequenceShard
from megatron_bitlm.model.bitlm import BitLM
from megatron_bitlm.model.initialization import initialize_parameters
from megatron_bitlm.parallel.state import ParallelConfig
from tests.distributed.trap_run import NUM_STEPS, Seen, open_session, watch_all
from tests.distributed_harness import free_port, run_ranks
from tests.training_runs import corpus, make_dataset, run_config

COMMON = {
    "model__backbone__num_layers": 4,
    "training__num_steps": NUM_STEPS,
    "optimizer__warmup_steps": 1,
    "training__micro_batch_size": 2,
    "training__global_batch_size": 8,
    "validation__num_samples": 8,
}
TENSOR = {"parallel__tensor_model_parallel_size": 2}
SEQUENCE = {**TENSOR, "parallel__sequence_parallel": True}
VIRTUAL = {"parallel__pipeline_model_parallel_size": 2, "parallel__virtual_pipeline_model_parallel_size": 2}
OVERLAP = {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}
# Nothing is dropped and nothing optional left out, or everything is dropped: unused parameters would show.
RARELY_USED = {"objective__condition_drop_probability": 0.0, "model__head__slot_embedding": True}
MIXING = {"model__head__conditioning": "mix", "objective__condition_drop_probability": 1.0}
TWO_RANKS = {
    "SP": SEQUENCE,
    "SP, marks taken off": SEQUENCE,
    "SP bf16": {**SEQUENCE, "training__precision": "bf16"},
    "VPP bf16": {**VIRTUAL, "training__precision": "bf16"},
    "CP": {"parallel__context_parallel_size": 2},
    "DP, no drops": {**OVERLAP, **RARELY_USED},
    "DP, all dropped": {**OVERLAP, **MIXING},
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"), "docs", corpus())


def watch_layouts(folder, prefix: str, layouts: dict, world_size: int) -> dict[str, list[Seen]]:
    configs = [
        run_config(folder / str(index), prefix, **COMMON, **overrides)
        for index, overrides in enumerate(layouts.values())
    ]
    sprung = ["taken off" in name for name in layouts]
    by_rank = run_ranks(watch_all, world_size, [free_port() for _ in layouts], configs, sprung, timeout_s=240)
    return {name: [results[index] for results in by_rank] for index, name in enumerate(layouts)}


@pytest.fixture(scope="module")
def seen(tmp_path_factory, prefix) -> dict[str, list[Seen]]:
    return watch_layouts(tmp_path_factory.mktemp("two"), prefix, TWO_RANKS, 2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, prefix) -> dict[str, Seen]:
    layouts = {"fp32": {}, "no drops": RARELY_USED, "all dropped": MIXING}
    return {name: ranks[0] for name, ranks in watch_layouts(tmp_path_factory.mktemp("one"), prefix, layouts, 1).items()}


def test_1_no_buffer_is_freed_under_an_overlapped_send(seen):
    for rank in seen["VPP bf16"]:
        assert rank.schedule["deallocate_pipeline_outputs"] is False
        # Batched sends of two interleaved stages meet the wrong receives.
        assert rank.schedule["overlap_p2p_comm"] is True and rank.schedule["batch_p2p_comm"] is False


@pytest.mark.parametrize("name", ["SP bf16", "VPP bf16", "DP, no drops"])
def test_2_an_optimizer_group_has_one_dtype_and_can_be_told_from_the_others(name, seen):
    for rank in seen[name]:
        assert rank.group_dtypes and all(len(dtypes) <= 1 for dtypes in rank.group_dtypes)
        assert len(set(rank.group_keys)) == len(rank.group_keys)


@pytest.mark.parametrize("name", ["SP bf16", "VPP bf16"])
def test_3_a_model_chunk_has_one_dtype(name, seen):
    """Buckets of a chunk are gathered in one message, which gloo corrupts where it mixes dtypes."""
    for rank in seen[name]:
        assert rank.buffer_dtypes
        assert all(dtypes == {(torch.bfloat16, torch.float32)} for dtypes in rank.buffer_dtypes)


def test_4_the_heads_gradients_are_summed_over_sequence_shards(seen, alone):
    for rank in seen["SP"]:
        assert rank.head_flags and all(rank.head_flags.values())
    for name in alone["fp32"].parameter_names:
        # megatron-core sums whatever has these words in its name over the tensor-parallel ranks.
        assert ".self_attention." in name or not ("q_layernorm" in name or "k_layernorm" in name)
    expected = [norms["gradient_norm/head"] for norms in alone["fp32"].norms]
    for rank in seen["SP"]:
        assert [norms["gradient_norm/head"] for norms in rank.norms] == pytest.approx(expected, rel=1e-5)
    for rank in seen["SP, marks taken off"]:  # and that would be seen
        assert rank.norms[0]["gradient_norm/head"] != pytest.approx(expected[0], rel=1e-2)


def test_5_the_loss_hands_over_a_sum_an_integer_count_and_its_own_metrics(seen, alone):
    expected = torch.stack(alone["fp32"].counts)
    assert expected.min() > 0 and len(expected.unique()) > 1
    for ranks in seen.values():
        for rank in ranks:
            assert all(count.dtype == torch.int32 for count in rank.counts)
            assert not rank.sums_alias_the_loss
            assert rank.schedule["calculate_per_token_loss"] is True  # of the triple, nothing is scaled by ranks
    for rank in seen["SP"]:  # all shards' blocks, on every shard
        assert torch.equal(torch.stack(rank.counts), expected)
    shares = [torch.stack(rank.counts) for rank in seen["CP"]]  # each rank's own blocks
    assert torch.equal(sum(shares), expected)
    assert all(0 < share.sum() < expected.sum() for share in shares)


def test_6_stages_draw_different_numbers_and_start_from_the_model_of_one_process(seen, prefix, tmp_path):
    first, second = (rank.draw for rank in seen["VPP bf16"])
    assert not torch.equal(first, second)
    with open_session(run_config(tmp_path / "run", prefix, **COMMON)) as (session, _):
        chunk = session.chunks[0]
        layers = [layer.mlp.linear_fc1.weight for layer in chunk.decoder.layers]
        assert not any(torch.equal(layers[0], other) for other in layers[1:])
        before = [layer.clone() for layer in layers]
        torch.manual_seed(77)  # what a stage's generator holds does not enter
        initialize_parameters(chunk, session.config.run.seed)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(layers, before, strict=True))


def test_7_times_and_noise_stay_in_fp32_under_bf16(seen):
    # The wrapper casts positional floats and every buffer.
    kinds = {p.kind for name, p in inspect.signature(BitLM.forward).parameters.items() if name != "self"}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    last = [*seen["SP bf16"], seen["VPP bf16"][1]]
    for rank in last:
        assert set(rank.head_input_dtypes) == {torch.float32}
    assert not any(rank.float_buffers for ranks in seen.values() for rank in ranks)


@pytest.mark.parametrize("name", ["no drops", "all dropped"])
def test_8_overlapped_reduction_finds_every_parameter_used(name, seen, alone):
    """megatron-core asserts that each parameter of a bucket got a gradient; these runs would not have ended."""
    expected = alone[name].loss
    for rank in seen[f"DP, {name}"]:
        assert rank.loss == pytest.approx(expected, rel=1e-5)


def test_9_layers_that_touch_bits_are_plain(alone):
    """FP8 kernels want sizes divisible by 16, which the number of bits is not."""
    assert alone["fp32"].bit_layers == {"input": nn.Linear, "head input": nn.Linear, "head output": nn.Linear}


def test_10_context_chunks_are_whole_blocks():
    layout = BlockCausalLayout.build(1, 48, 4)
    for num_ranks in (2, 3):
        for rank in range(num_ranks):
            shard = SequenceShard.build(layout, rank, num_ranks)
            assert all(chunk.start % 4 == 0 and chunk.stop % 4 == 0 for chunk in shard.chunks)
    with pytest.raises(ValueError, match="chunks of whole blocks"):
        SequenceShard.build(BlockCausalLayout.build(1, 24, 4), 0, 2)
    with pytest.raises(ValueError, match="must be a multiple of 2 x 2 x 4"):
        ParallelConfig(context_parallel_size=2).validate_sequence(24, 4)
