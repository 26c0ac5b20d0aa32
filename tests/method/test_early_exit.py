"""Blocks that end before their last step: which, when, with which bits, and that no other block notices."""

from dataclasses import replace

import pytest
import torch

from megatron_bitlm.method.head import DiffusionHead, HeadConfig
from megatron_bitlm.method.sampler import BlockSampler, KnownSlots, SamplerConfig
from tests.method.toys import ExactHead, TokenToy, zipf

TOY = TokenToy(zipf(8, 1.3))
NUM, SLOTS, BITS = 12, 4, 3


def noise(num=NUM, seed=0, slots=SLOTS):
    return torch.randn(num, slots, BITS, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(0)
    head = DiffusionHead(
        HeadConfig(width=16, num_layers=2, head_dim=8, conditioning="mix", parameterization="matched_filter"),
        num_bits=BITS,
        block_size=SLOTS,
        condition_size=6,
    )
    for parameter in head.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return head


CONDITION = torch.randn(NUM, SLOTS, 6, generator=torch.Generator().manual_seed(3))
CONFIGS = [
    SamplerConfig(num_steps=8, guidance=1.0),
    SamplerConfig(num_steps=8, guidance=3.0),
    SamplerConfig(num_steps=8, guidance=3.0, noise_raise=0.3, noise_gate="constant"),
]
MASK = torch.arange(SLOTS) < (torch.arange(NUM) % 3)[:, None]
KNOWN = KnownSlots(torch.sign(noise(seed=7)), MASK)


def fresh(step):
    return noise(seed=100 + step)


def estimates(head, config, known):
    """What the head says of every step of every block, none of them ended."""
    seen = []
    sampler = BlockSampler(head, config)
    original = sampler._estimate
    sampler._estimate = lambda *arguments: seen.append(original(*arguments)) or seen[-1]
    sampler.sample(CONDITION, noise(), known=known, fresh_noise=fresh)
    return seen


def expected(head, config, known):
    """(bits, evaluations) by the rule, block by block, in plain Python."""
    every = estimates(head, replace(config, early_exit=None), known)
    bits, counts = [], []
    for block in range(NUM):
        open_slots = torch.ones(SLOTS, dtype=torch.bool) if known is None else ~known.mask[block]
        held, before = 0, None
        for step, estimate in enumerate(every):
            clean, conditional = estimate.clean[block], torch.tanh(estimate.logits[block] / 2)
            if before is None or not torch.equal(clean >= 0, before):
                held = 0
            before = clean >= 0
            sure = torch.minimum(clean.abs(), torch.where(clean >= 0, conditional, -conditional))
            held = held + 1 if bool((sure[open_slots] >= config.early_exit).all()) else 0
            if held >= config.early_exit_steps or step == len(every) - 1:
                break
        bits.append(clean if known is None else torch.where(open_slots[:, None], clean, known.codes[block]))
        counts.append(step + 1)
    return torch.stack(bits), counts


@pytest.mark.parametrize("known", [None, KNOWN], ids=["free", "known"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "guided", "noisy"])
def test_blocks_end_by_the_rule_and_the_others_do_not_notice(head, config, steps, known):
    config = replace(config, early_exit=0.5, early_exit_steps=steps)
    found = BlockSampler(head, config).sample(CONDITION, noise(), known=known, fresh_noise=fresh)
    bits, counts = expected(head, config, known)
    assert found.num_evaluations == counts and len(set(counts)) > 1
    torch.testing.assert_close(found.bits, bits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "guided", "noisy"])
def test_the_batch_of_the_head_shrinks_with_every_block_that_ends(head, config):
    sizes = []
    hook = head.input.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    config = replace(config, early_exit=0.5)
    found = BlockSampler(head, config).sample(CONDITION, noise(), fresh_noise=fresh)
    hook.remove()
    sides = 1 if config.guidance == 1.0 else 2
    assert sum(sizes) == sides * sum(found.num_evaluations) < sides * NUM * config.num_steps


@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "guided", "noisy"])
def test_without_it_the_head_is_evaluated_exactly_as_often_as_there_are_steps(head, config):
    calls = []
    hook = head.input.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    found = BlockSampler(head, config).sample(CONDITION, noise(), fresh_noise=fresh)
    hook.remove()
    assert len(calls) == config.num_steps and found.num_evaluations == [config.num_steps] * NUM
    # No estimate is ever so far from zero: the same bits, bit for bit.
    never = BlockSampler(head, replace(config, early_exit=1e9)).sample(CONDITION, noise(), fresh_noise=fresh)
    assert torch.equal(never.bits, found.bits) and never.num_evaluations == found.num_evaluations


def test_observers_see_every_time_and_ended_blocks_keep_their_bits(head):
    seen = []
    config = SamplerConfig(num_steps=8, guidance=1.0, early_exit=0.2)
    found = BlockSampler(head, config).sample(
        CONDITION, noise(), known=KNOWN, observe=lambda time, state: seen.append((time, state.clone()))
    )
    assert max(found.num_evaluations) < 8  # all ended early, and the observer is still shown the rest
    assert [time for time, _ in seen] == BlockSampler(head, config).times
    for block, count in enumerate(found.num_evaluations):
        for _, state in seen[count:]:
            assert torch.equal(state[block], found.bits[block])


def test_an_exact_posterior_rarely_changes_its_mind():
    """With the true posterior, bits that are 99% sure turn out otherwise in about a percent of blocks."""
    num, config = 20_000, SamplerConfig(num_steps=15, guidance=1.0)
    run = lambda config: BlockSampler(ExactHead(TOY), config).sample(torch.zeros(num, 1, 1), noise(num, slots=1))  # noqa: E731
    whole, early = run(config), run(replace(config, early_exit=0.98))
    changed = ((whole.bits >= 0) != (early.bits >= 0)).flatten(1).any(1).float().mean()
    saved = 1 - sum(early.num_evaluations) / sum(whole.num_evaluations)
    assert changed < 0.015 and saved > 0.1, (changed, saved)
