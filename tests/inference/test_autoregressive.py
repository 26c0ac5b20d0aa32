"""Token-by-token generation with the softmax baseline: cache, batches, greedy choice, seeds and the command."""

import json

import pytest
import torch

from megatron_bitlm.cli import main
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.inference.generate import Generator, TokenGenerator
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.token_sampling import TokenSamplerConfig
from megatron_bitlm.model.bitlm import BitLM
from megatron_bitlm.model.build import BackboneOverrides, ModelConfig, build_chunks, unwrap
from megatron_bitlm.model.layout import SequenceLayout
from megatron_bitlm.parallel.state import ParallelConfig, initialize_parallel, shutdown_parallel
from tests.training_runs import corpus, make_dataset, train

BOS, EOS, SLOTS = 256, 257, 4
PROMPTS = [[], [65], [9, 8, 7, 6, 5], list(range(40, 53))]
GREEDY = TokenSamplerConfig(temperature=0)


@pytest.fixture(scope="module")
def model():
    state = initialize_parallel(ParallelConfig(), seed=0)
    shape = BackboneOverrides(2, 32, 64, 4, 2, head_dim=8)
    config = ModelConfig(output="softmax", backbone=shape, block_size=SLOTS)
    chunks = build_chunks(config, state, code=BinaryCode(258), bos_id=BOS, eos_id=EOS, precision="fp32", seed=1)
    model = unwrap(chunks[0]).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    yield model
    shutdown_parallel()


def generate(model, prompts, sampler=None, cached=True, **settings):
    generator = TokenGenerator(model, sampler=sampler, cached=cached)
    return generator.generate(prompts, **{"max_new_tokens": 12} | settings)


@pytest.mark.parametrize("sampler", [GREEDY, TokenSamplerConfig(temperature=0.8, top_p=0.9)])
def test_cached_is_uncached(model, sampler):
    runs = []
    for cached in (True, False):
        generator = TokenGenerator(model, sampler=sampler, cached=cached)
        realise, seen = generator.decoder.realise, []

        def note(condition, rows, observe, realise=realise, seen=seen):
            seen.append({row.request.seed: state for row, state in zip(rows, condition, strict=True)})
            return realise(condition, rows, observe)

        generator.decoder.realise = note
        runs.append((generator.generate(PROMPTS, max_new_tokens=12), seen))
    (results, seen), (expected, whole) = runs
    assert results == expected and len(seen) == len(whole) > 3
    for found, wanted in zip(seen, whole, strict=True):
        assert found.keys() == wanted.keys()
        for seed, state in found.items():
            torch.testing.assert_close(state, wanted[seed], atol=4e-6, rtol=1e-5)


def test_greedy_takes_the_likeliest_token_of_one_pass(model):
    [result] = generate(model, [PROMPTS[2]], GREEDY)
    ids = torch.tensor([[BOS] * SLOTS + PROMPTS[2] + result.ids + [EOS] * result.finished])
    with torch.no_grad():
        layout = SequenceLayout.from_batch(None, 1, ids.shape[1], 1)
        best = model.logits(model.states(ids, layout))[:, 0].argmax(-1)
    first = SLOTS + len(PROMPTS[2])
    assert best[first - 1 : -1].tolist() == ids[0, first:].tolist() and len(result.ids) > 3


@pytest.mark.parametrize("sampler", [GREEDY, TokenSamplerConfig()])
def test_a_row_does_not_depend_on_its_batch(model, sampler):
    seeds = [11, 2**40, 0, 7]
    together = generate(model, PROMPTS, sampler, seeds=seeds)
    for prompt, seed, result in zip(PROMPTS, seeds, together, strict=True):
        assert generate(model, [prompt], sampler, seeds=[seed]) == [result]


def test_seeds_decide(model):
    first = generate(model, PROMPTS, seeds=[1, 2, 3, 4])
    assert generate(model, PROMPTS, seeds=[1, 2, 3, 4]) == first
    again = generate(model, PROMPTS, seeds=[5, 6, 7, 8])
    assert all(ours.ids != theirs.ids for ours, theirs in zip(again, first, strict=True))
    assert generate(model, PROMPTS, GREEDY, seeds=[5, 6, 7, 8]) == generate(model, PROMPTS, GREEDY)


def test_eos_ends_a_row_and_only_that(model):
    [free] = generate(model, [PROMPTS[1]], GREEDY)
    end = free.ids[4]
    original, model.eos_id = model.eos_id, end
    try:
        ended, other = generate(model, [PROMPTS[1], PROMPTS[3]], GREEDY)
    finally:
        model.eos_id = original
    assert ended.finished and ended.ids == free.ids[: free.ids.index(end)]
    assert other.finished or len(other.ids) == 12


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([], {}, "no prompts"),
        ([[258]], {}, "prompt id 258 is outside the vocabulary of 258"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"seeds": [-1]}, "seeds"),
        ([[1]], {"sampler": TokenSamplerConfig(top_p=2.0)}, "sampler: top_p"),
    ],
)
def test_bad_requests(model, prompts, settings, words):
    with pytest.raises(BitLMError, match=words):
        generate(model, prompts, **settings)


def test_generators_take_their_own_kind_of_model(model):
    with pytest.raises(BitLMError, match="model.output softmax.*use TokenDecoder"):
        Generator(model, model.code, bos_id=BOS, eos_id=EOS)
    with pytest.raises(BitLMError, match="model.output diffusion.*use BlockDecoder"):
        TokenGenerator(object.__new__(BitLM))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model):
    shutdown_parallel()
    folder = tmp_path_factory.mktemp("runs")
    prefix = make_dataset(folder, "docs", corpus())
    common = {"training__num_steps": 2, "optimizer__warmup_steps": 0, "validation__interval_steps": 0}
    for output in ("softmax", "diffusion"):
        train(folder / output, prefix, model__output=output, **common)
    return folder


def command(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_commands_take_a_softmax_checkpoint(runs, capsys):
    options = ["generate", "--checkpoint", runs / "softmax", "--prompt", "abc", "", "--max-new-tokens", 6, "--json"]
    outs = []
    for extra in ([], ["--seed", 9], ["--temperature", 0], ["--temperature", 0, "--seed", 9]):
        status, out, _ = command(capsys, *options, "--top-k", 200, *extra)
        lines = [json.loads(line) for line in out.splitlines()]
        assert status == 0 and all(len(line["ids"]) == 6 or line["finished"] for line in lines)
        outs.append(out)
    assert outs[0] != outs[1] and outs[2] == outs[3]
    status, out, _ = command(capsys, "evaluate", "likelihood", "--checkpoint", runs / "softmax")
    assert status == 0 and "softmax     = " in out and "perplexity = " in out and "<=" not in out


def test_options_of_the_other_model_are_refused(runs, capsys):
    for run, option, kind in (("softmax", "--steps", "BitLM"), ("diffusion", "--temperature", "softmax")):
        arguments = ["generate", "--checkpoint", runs / run, "--prompt", "a", option, 1]
        status, out, err = command(capsys, *arguments)
        assert status == 2 and out == "" and err.count("\n") == 1
        assert f"{option} is an option of {kind} models" in err and f"model.output {run}" in err
