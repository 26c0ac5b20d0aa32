"""What a training pass hands to the objective: shifted targets, conditions and input noise."""

import pytest
import torch

from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.head import HeadConfig
from megatron_bitlm.method.objective import flip_bits
from megatron_bitlm.model.bitlm import BitFlips
from megatron_bitlm.model.build import BackboneOverrides, ModelConfig, build_chunks, unwrap
from megatron_bitlm.model.layout import SequenceLayout
from megatron_bitlm.parallel.state import ParallelConfig, initialize_parallel, shutdown_parallel

CODE = BinaryCode(258)
ROWS, BLOCKS, SLOTS = 2, 6, 4
SAMPLES = torch.tensor([3, 2**33])


@pytest.fixture(scope="module")
def model():
    state = initialize_parallel(ParallelConfig(), seed=0)
    shape = BackboneOverrides(2, 32, 64, 4, 2, head_dim=8)
    config = ModelConfig(backbone=shape, block_size=SLOTS, head=HeadConfig(width=16, num_layers=2, head_dim=8))
    yield unwrap(build_chunks(config, state, code=CODE, bos_id=256, eos_id=257, precision="fp32", seed=1)[0])
    shutdown_parallel()


def score(model, ids, flips=None):
    """(condition, clean, sample, block) as the objective gets them, and the scored blocks."""
    packed = CODE.pack(ids)
    layout = SequenceLayout.from_batch(None, ROWS, BLOCKS * SLOTS, SLOTS)
    scored = model(
        packed=packed,
        layout=layout,
        sample_index=SAMPLES,
        objective=lambda head, *arguments: arguments,
        flips=flips,
    )
    return scored.scores, scored


def make_ids():
    ids = torch.randint(0, 256, (ROWS, BLOCKS + 1, SLOTS), generator=torch.Generator().manual_seed(0))
    ids[0, 3] = 256  # the next document's BOS
    ids[1, 4, 2:] = 257
    return ids


def test_targets_are_the_next_blocks_and_conditions_the_states_before(model):
    ids = make_ids()
    (condition, clean, sample, block), scored = score(model, ids)
    assert torch.equal(CODE.decode(clean), ids[:, 1:])
    assert torch.equal(sample, SAMPLES) and block.tolist() == list(range(BLOCKS))
    assert scored.num_valid.item() == ROWS * BLOCKS - 1
    assert scored.counts.valid.tolist() == [[True, True, False, True, True, True], [True] * 6]
    assert scored.counts.num_tokens.tolist() == [[4, 4, 0, 4, 4, 4], [4, 4, 4, 3, 4, 4]]
    layout = SequenceLayout.from_batch(None, ROWS, BLOCKS * SLOTS, SLOTS)
    states = model.states(CODE.encode(ids[:, :-1]).flatten(1, 2), layout).transpose(0, 1)
    torch.testing.assert_close(condition, states.unflatten(1, (BLOCKS, SLOTS)))
    # The last target block is no input: it moves nothing but itself.
    changed = ids.clone()
    changed[:, -1] = 1
    assert torch.equal(score(model, changed)[0][0], condition)


def test_bit_flips_touch_the_inputs_and_leave_the_targets_clean(model):
    ids = make_ids()
    (plain, clean, *_), _ = score(model, ids)
    (noisy, targets, *_), scored = score(model, ids, BitFlips(0.3, seed=5))
    assert torch.equal(targets, clean) and scored.num_valid.item() == ROWS * BLOCKS - 1
    assert not torch.equal(noisy, plain)
    flipped = flip_bits(CODE.encode(ids[:, :-1]), 0.3, 5, SAMPLES, torch.arange(BLOCKS))
    layout = SequenceLayout.from_batch(None, ROWS, BLOCKS * SLOTS, SLOTS)
    states = model.states(flipped.flatten(1, 2), layout).transpose(0, 1)
    torch.testing.assert_close(noisy, states.unflatten(1, (BLOCKS, SLOTS)))
    (again, *_), _ = score(model, ids, BitFlips(0.0, seed=5))
    assert torch.equal(again, plain)


def test_the_last_stage_needs_an_objective(model):
    packed = CODE.pack(make_ids())
    layout = SequenceLayout.from_batch(None, ROWS, BLOCKS * SLOTS, SLOTS)
    with pytest.raises(ValueError, match="objective"):
        model(packed=packed, layout=layout, sample_index=SAMPLES, objective=None)
