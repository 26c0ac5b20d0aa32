"""Block-wise generation with a small random model: cache, batches, prompts, ends and seeds."""

from dataclasses import asdict, replace

import pytest
import torch

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.inference.generate import Generator
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.head import HeadConfig
from megatron_bitlm.method.sampler import SamplerConfig
from megatron_bitlm.model.build import BackboneOverrides, ModelConfig, build_chunks, unwrap
from megatron_bitlm.model.layout import SequenceLayout
from megatron_bitlm.parallel.state import ParallelConfig, initialize_parallel, shutdown_parallel

CODE = BinaryCode(258)
BOS, EOS = 256, 257
SAMPLER = SamplerConfig(num_steps=4, guidance=2.0)
# Empty, shorter than a block, a block, and over it, for blocks of 1, 2 and 4.
PROMPTS = [[], [65], [66, 67, 68], [1, 2, 3, 4], [9, 8, 7, 6, 5], list(range(40, 53))]


@pytest.fixture(scope="module", autouse=True)
def single_process():
    state = initialize_parallel(ParallelConfig(), seed=0)
    yield state
    shutdown_parallel()


@pytest.fixture(scope="module")
def make_model(single_process):
    models = {}

    def make(block_size, precision="fp32"):
        if (block_size, precision) not in models:
            config = ModelConfig(
                preset="tiny",
                backbone=BackboneOverrides(
                    num_layers=2,
                    hidden_size=32,
                    ffn_hidden_size=64,
                    num_attention_heads=4,
                    num_query_groups=2,
                    head_dim=8,
                ),
                block_size=block_size,
                head=HeadConfig(width=32, num_layers=2, num_modulation_groups=1, head_dim=16, conditioning="mix"),
            )
            chunks = build_chunks(
                config, single_process, code=CODE, bos_id=BOS, eos_id=EOS, precision=precision, seed=1
            )
            model = unwrap(chunks[0]).eval()
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    # Far from its start: attention that is not flat, and a head that answers to its condition.
                    if "layernorm" not in name:
                        scale = 0.5 if name.startswith("head") else 0.2
                        parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
            models[block_size, precision] = model
        return models[block_size, precision]

    return make


def make_generator(model, **settings) -> Generator:
    return Generator(model, CODE, **{"bos_id": BOS, "eos_id": EOS, "sampler": SAMPLER} | settings)


def run(generator, prompts, **settings):
    return generator.generate(prompts, **{"max_new_tokens": 13} | settings)


class Recorder:
    """States of the backbone as a generator asks for them, and what it conditions on."""

    def __init__(self, model, generator=None) -> None:
        self.model, self.generator, self.hidden, self.conditions = model, generator, [], []

    def __enter__(self):
        self.original = self.model.states
        self.model.states = self._states
        if self.generator is not None:
            self.realise = self.generator.decoder.realise
            self.generator.decoder.realise = self._realise
        return self

    def __exit__(self, *_):
        del self.model.states

    def _realise(self, condition, rows, observe):
        self.conditions.append({row.request.seed: state for row, state in zip(rows, condition, strict=True)})
        return self.realise(condition, rows, observe)

    def _states(self, codes, layout):
        hidden = self.original(codes, layout)
        self.hidden.append((hidden.clone(), codes.shape[:2]))
        return hidden


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_cached_is_uncached(make_model, block_size, precision):
    model = make_model(block_size, precision)
    runs = []
    for cached in (True, False):
        generator = make_generator(model, cached=cached)
        with Recorder(model, generator) as recorder:
            results = run(generator, PROMPTS)
        runs.append((results, recorder.conditions, [shape for _, shape in recorder.hidden]))
    (results, states, shapes), (expected, whole, whole_shapes) = runs
    assert results == expected and len(states) == len(whole) > 3
    differences = []
    for found, wanted in zip(states, whole, strict=True):
        assert found.keys() == wanted.keys()
        differences += [(found[seed] - wanted[seed]).abs().max().item() for seed in found]
        assert max(state.abs().max().item() for state in found.values()) > 0.5
    print(f"m = {block_size}, {precision}: cached and uncached states differ by {max(differences):.2e} at most")
    assert max(differences) <= (2e-12 if precision == "fp64" else 4e-6)
    # The cache feeds one block of each row at a time, the other path all of every row.
    assert all(shape[1] == block_size for shape in shapes[1:])
    assert all(rows == 1 and length > 2 * block_size for rows, length in whole_shapes)


@pytest.mark.parametrize("block_size", [1, 4])
def test_states_are_those_of_one_training_pass(make_model, block_size):
    """What generation conditions on is what one pass over the finished sequence gives."""
    model = make_model(block_size, "fp64")
    prompt = PROMPTS[4]
    with Recorder(model) as recorder:
        result = run(make_generator(model, eos_id=-1), [prompt])[0]
    ids = [BOS] * block_size + prompt + result.ids
    length = recorder.hidden[0][1][1] + (len(recorder.hidden) - 1) * block_size
    layout = SequenceLayout.from_batch(None, 1, length, block_size)
    whole = model.states(CODE.encode(torch.tensor([ids[:length]])), layout)
    generated = torch.cat([recorder.hidden[0][0], *(hidden for hidden, _ in recorder.hidden[1:])])
    assert (generated - whole).abs().max().item() < 1e-11


@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("noise_raise", [0.0, 0.3])
def test_a_row_does_not_depend_on_its_batch(make_model, block_size, noise_raise):
    model = make_model(block_size)
    generator = make_generator(model, sampler=replace(SAMPLER, noise_raise=noise_raise, noise_gate="constant"))
    seeds = [11, 5, 2**40, 0, 7, 3]
    together = run(generator, PROMPTS, seeds=seeds)
    for prompt, seed, result in zip(PROMPTS, seeds, together, strict=True):
        assert run(generator, [prompt], seeds=[seed]) == [result]
    backwards = run(generator, PROMPTS[::-1], seeds=seeds[::-1])
    assert backwards[::-1] == together
    assert len({tuple(result.ids) for result in together}) == len(PROMPTS)


@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("max_new_tokens", [1, 3, 4, 9])
def test_the_limit_is_met_exactly(make_model, block_size, max_new_tokens):
    generator = make_generator(make_model(block_size), eos_id=-1)  # nothing ends it early
    results = run(generator, PROMPTS, max_new_tokens=max_new_tokens)
    longer = run(generator, PROMPTS, max_new_tokens=max_new_tokens + 5)
    for prompt, result, more in zip(PROMPTS, results, longer, strict=True):
        assert len(result.ids) == max_new_tokens and not result.finished
        assert more.ids[:max_new_tokens] == result.ids
        assert result.num_blocks == -(-(len(prompt) % block_size + max_new_tokens) // block_size)
        assert all(0 <= token < CODE.vocab_size for token in result.ids)


@pytest.mark.parametrize("block_size", [1, 4])
def test_generation_stops_at_the_first_eos_and_drops_what_follows(make_model, block_size):
    """Any id may serve as EOS: the one that comes up third in a free run ends it there."""
    model = make_model(block_size)
    free = run(make_generator(model, eos_id=-1), PROMPTS)
    for row, (prompt, result) in enumerate(zip(PROMPTS, free, strict=True)):
        eos = result.ids[6]
        first = result.ids.index(eos)
        ended = run(make_generator(model, eos_id=eos), [prompt], seeds=[row])[0]
        assert ended.finished and ended.ids == result.ids[:first]
        assert ended.num_blocks == (len(prompt) % block_size + first) // block_size + 1
    # In a batch, one row's end leaves the others alone.
    eos = free[2].ids[6]
    batch = run(make_generator(model, eos_id=eos), PROMPTS)
    for result, whole in zip(batch, free, strict=True):
        cut = whole.ids.index(eos) if eos in whole.ids else None
        assert result.ids == whole.ids[:cut] and result.finished == (cut is not None)


def test_an_eos_behind_the_limit_does_not_count(make_model):
    model = make_model(4)
    free = run(make_generator(model, eos_id=-1), [[]])[0].ids
    position = next(k for k in range(1, 12) if free[k] not in free[:k] and k % 4)
    cut = run(make_generator(model, eos_id=free[position]), [[]], max_new_tokens=position)[0]
    assert cut.ids == free[:position] and not cut.finished


def test_seeds(make_model):
    generator = make_generator(make_model(4))
    first = run(generator, [[1, 2]] * 3, seeds=[4, 5, 4])
    assert first[0] == first[2] != first[1]
    assert run(generator, [[1, 2]] * 3, seeds=[4, 5, 4]) == first
    assert run(generator, [[1, 2]] * 2) == run(generator, [[1, 2]] * 2, seeds=[0, 1])


def test_noise_of_consecutive_blocks_and_seeds_differs(make_model):
    start = {}

    def observe(number, time, state):
        if time == 1.0:
            start[number] = state.clone()

    run(make_generator(make_model(4), eos_id=-1), [[], []], observe=observe)
    noise = torch.stack([start[k] for k in sorted(start)])
    assert len(noise) == 4 and len({tuple(x) for x in noise.flatten(0, 1).flatten(1).tolist()}) == 8
    assert abs(noise.mean().item()) < 0.3 and noise.std().item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("noise_raise", [0.0, 0.3])
def test_a_partial_block_keeps_the_prompt_and_is_denoised_around_it(make_model, noise_raise):
    model, seen = make_model(4), {}
    generator = make_generator(model, sampler=replace(SAMPLER, noise_raise=noise_raise), eos_id=-1)
    committed = []

    def observe(number, time, state):
        seen.setdefault(number, []).append((time, state.clone()))

    with Recorder(model) as recorder:
        original = recorder._states
        model.states = lambda codes, layout: committed.append(CODE.decode(codes)) or original(codes, layout)
        run(generator, PROMPTS, observe=observe)
    for row, prompt in enumerate(PROMPTS):
        known = len(prompt) % 4
        codes = CODE.encode(torch.tensor(prompt[len(prompt) - known :], dtype=torch.int64))
        noise = seen[0][0][1][row, :known]
        for time, state in seen[0]:
            assert torch.equal(state[row, :known], (1 - time) * codes + time * noise)
        if known:
            assert committed[1][row, :known].tolist() == prompt[len(prompt) - known :]
    # The open slots answer to the known ones.
    a, b = (run(generator, [[50, 51, 52, 53, token]], max_new_tokens=3)[0].ids for token in (10, 240))
    assert a != b


def test_the_prompt_matters_and_is_not_altered(make_model):
    generator = make_generator(make_model(4))
    prompts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 99, 6]]
    first, second = run(generator, prompts, seeds=[3, 3])
    assert first.ids != second.ids
    assert prompts == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 99, 6]]
    assert run(generator, [tuple(prompts[0])], seeds=[3]) == [first]


def test_the_stochastic_sampler_runs_and_repeats(make_model):
    sampler = replace(SAMPLER, num_steps=6, noise_raise=0.4, noise_gate="constant")
    generator = make_generator(make_model(4), sampler=sampler)
    first = run(generator, PROMPTS)
    assert first == run(generator, PROMPTS)
    assert first != run(make_generator(make_model(4), sampler=replace(sampler, noise_raise=0.0)), PROMPTS)


@pytest.mark.parametrize("grid", ["uniform", "logsnr", "entropy"])
@pytest.mark.parametrize("mode", ["mean", "clipped", "logit"])
def test_every_grid_and_guidance_mode_generates(make_model, grid, mode):
    sampler = SamplerConfig(num_steps=3, guidance=9.0, guidance_mode=mode, grid=grid)
    result = run(make_generator(make_model(2), sampler=sampler, eos_id=-1), [[3]], max_new_tokens=5)[0]
    assert len(result.ids) == 5 and asdict(result)["finished"] is False


def test_invalid_patterns_become_ids_and_are_counted(make_model):
    """258 of 512 patterns are ids: a random model ends many slots on others."""
    finals = {}

    def observe(number, time, state):
        if time == 0.0:
            finals[number] = state.clone()

    result = run(make_generator(make_model(4), eos_id=-1), [[]], max_new_tokens=40, observe=observe)[0]
    signs = torch.cat([(finals[k][0] >= 0).long() for k in sorted(finals)])
    patterns = (signs * 2 ** torch.arange(8, -1, -1)).sum(-1)
    assert result.num_invalid == int((patterns >= 258).sum()) > 0
    assert all((p == i) for p, i in zip(patterns.tolist(), result.ids, strict=True) if p < 258)


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([], {}, "no prompts"),
        ([[1, 258]], {}, "prompt id 258 is outside the vocabulary of 258"),
        ([[-1]], {}, "prompt id -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1]], {"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ([[1]], {"seeds": [-1]}, "seeds must lie"),
        ([[1]], {"seeds": [2**63]}, "seeds must lie"),
    ],
)
def test_bad_requests_are_refused(make_model, prompts, settings, words):
    with pytest.raises(BitLMError, match=words):
        run(make_generator(make_model(4)), prompts, **settings)


def test_bad_sampler_settings_are_named(make_model):
    with pytest.raises(BitLMError, match="sampler: .*num_steps.* 0"):
        make_generator(make_model(4), sampler=SamplerConfig(num_steps=0))
