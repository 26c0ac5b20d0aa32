"""Continuous batches: requests that come, go and differ, against each of them alone."""

import pytest
import torch

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.inference.decoders import BlockDecoder, TokenDecoder
from megatron_bitlm.inference.engine import Engine
from megatron_bitlm.inference.prompts import Request
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.head import HeadConfig
from megatron_bitlm.method.sampler import SamplerConfig
from megatron_bitlm.method.token_sampling import TokenSamplerConfig
from megatron_bitlm.model.build import BackboneOverrides, ModelConfig, build_chunks, unwrap
from megatron_bitlm.parallel.state import ParallelConfig, initialize_parallel, shutdown_parallel

CODE, BOS, EOS = BinaryCode(258), 256, 257
FAST, GUIDED = SamplerConfig(num_steps=3, guidance=1.0), SamplerConfig(num_steps=4, guidance=2.0)
PROMPTS = [[], [65], [66, 67, 68], list(range(40, 53)), [9, 8, 7, 6, 5], [1, 2, 3, 4]]


@pytest.fixture(scope="module")
def decoders():
    state = initialize_parallel(ParallelConfig(), seed=0)
    shape, head = BackboneOverrides(2, 32, 64, 4, 2, head_dim=8), HeadConfig(width=32, num_layers=2, head_dim=16)
    made = {}
    for output in ("diffusion", "softmax"):
        config = ModelConfig(output=output, backbone=shape, block_size=4, head=head)
        chunks = build_chunks(config, state, code=CODE, bos_id=BOS, eos_id=EOS, precision="fp32", seed=1)
        model = unwrap(chunks[0]).eval()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layernorm" not in name:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        made[output] = model
    yield {
        "diffusion": BlockDecoder(made["diffusion"], CODE, bos_id=BOS, eos_id=EOS),
        "softmax": TokenDecoder(made["softmax"]),
    }
    shutdown_parallel()


def requests(kind: str) -> list[Request]:
    """Different prompts, limits, seeds and samplers."""
    samplers = [FAST, GUIDED] if kind == "diffusion" else [TokenSamplerConfig(), TokenSamplerConfig(temperature=0)]
    return [
        Request(prompt, 5 + 3 * index, seed=10 + index, sampler=samplers[index % 2])
        for index, prompt in enumerate(PROMPTS)
    ]


def engine(decoder, **settings) -> Engine:
    return Engine(decoder, **{"max_batch_size": 3, "max_length": 48} | settings)


@pytest.mark.parametrize("kind", ["diffusion", "softmax"])
@pytest.mark.parametrize("max_batch_size", [1, 3, 6])
def test_a_request_gets_what_it_gets_alone(decoders, kind, max_batch_size):
    alone = [engine(decoders[kind]).run([request])[0] for request in requests(kind)]
    assert engine(decoders[kind], max_batch_size=max_batch_size).run(requests(kind)) == alone
    assert len({tuple(result.ids) for result in alone}) == len(alone)


def test_requests_that_come_while_others_are_decoded(decoders):
    expected = [engine(decoders["diffusion"]).run([request])[0] for request in requests("diffusion")]
    busy, coming, results, streamed = engine(decoders["diffusion"]), requests("diffusion"), {}, {}
    order = {id(request): index for index, request in enumerate(coming)}
    waiting = list(coming)
    while waiting or busy.has_work:
        if waiting:
            busy.add(waiting.pop(0))
        for progress in busy.step():
            index = order[id(progress.request)]
            streamed[index] = streamed.get(index, []) + progress.ids
            if progress.result is not None:
                results[index] = progress.result
    assert [results[index] for index in range(len(coming))] == expected
    assert [streamed[index] for index in range(len(coming))] == [result.ids for result in expected]


def test_a_cancelled_request_leaves_the_others_alone(decoders):
    coming = requests("diffusion")[:4]
    expected = [engine(decoders["diffusion"]).run([request])[0] for request in coming]
    busy, results = engine(decoders["diffusion"]), {}
    for request in coming:
        busy.add(request)
    busy.step()
    busy.cancel(coming[0])  # being decoded
    busy.cancel(coming[3])  # waiting
    busy.cancel(requests("diffusion")[5])  # unknown
    while busy.has_work:
        results |= {id(p.request): p.result for p in busy.step() if p.result is not None}
    assert [results.get(id(request)) for request in coming] == [None, expected[1], expected[2], None]


def test_prompts_are_admitted_together_up_to_a_limit(decoders):
    seen = []
    busy = engine(decoders["diffusion"], max_batch_size=6, max_prompt_tokens=12)
    original = busy.decoder.states
    busy.decoder.states = lambda ids, layout: seen.append(tuple(ids.shape)) or original(ids, layout)
    try:
        busy.run(requests("diffusion"))
    finally:
        del busy.decoder.states
    assert seen[0] == (1, 12)  # the first three: a block of BOS each
    assert (1, 16) in seen  # one prompt alone may be longer
    assert all(batch > 1 or length <= 16 for batch, length in seen)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([1] * 40, 6), "a prompt of 40 tokens and 6 new ones take 52 with their framing, more than the 48"),
        (Request([300], 1), "prompt id 300 is outside the vocabulary of 258"),
        (Request([1], 0), "max_new_tokens must be at least 1, got 0"),
        (Request([1], 1, seed=-1), "seeds must lie in"),
        (Request([1], 1, sampler=SamplerConfig(num_steps=0)), "num_steps must be at least 1, got 0"),
        (Request([1], 1, sampler=SamplerConfig(guidance=-1.0)), "guidance must be a number >= 0, got -1.0"),
        (Request([1], 1, sampler=TokenSamplerConfig()), "takes the settings of a SamplerConfig"),
    ],
)
def test_bad_requests_are_refused_and_the_others_go_on(decoders, request_, words):
    busy = engine(decoders["diffusion"])
    good = requests("diffusion")[2]
    busy.add(good)
    with pytest.raises(BitLMError, match=words):
        busy.add(request_)
    assert busy.run([]) == [] and not busy.has_work


def test_a_softmax_model_takes_its_own_sampler(decoders):
    with pytest.raises(BitLMError, match="takes the settings of a TokenSamplerConfig"):
        engine(decoders["softmax"]).add(Request([1], 1, sampler=FAST))


def test_sizes_of_the_engine_are_checked(decoders):
    with pytest.raises(BitLMError, match="max_batch_size must be at least 1, got 0"):
        engine(decoders["diffusion"], max_batch_size=0)


@pytest.mark.gpu
def test_graphs_give_what_plain_calls_give(decoders):
    plain, graphed = (
        BlockDecoder(decoders["diffusion"].model, CODE, bos_id=BOS, eos_id=EOS, cuda_graphs=on) for on in (False, True)
    )
    assert engine(graphed).run(requests("diffusion")) == engine(plain).run(requests("diffusion"))
    assert engine(graphed).run(requests("diffusion")) == engine(plain).run(requests("diffusion"))  # replayed
