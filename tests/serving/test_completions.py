"""Completions by the openai client: the texts of the generator, whole and streamed, whatever else runs."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.serving.conftest import generated

FAST = {"num_steps": 4, "guidance": 1.5}


def test_a_completion_is_the_generators(server):
    answer = server.complete(seed=5, **FAST)
    text, result = generated(server, "abc def", 5, **FAST)
    choice = answer.choices[0]
    assert choice.text == text and choice.seed == 5
    assert choice.finish_reason == ("stop" if result.finished else "length")
    assert answer.object == "text_completion" and answer.model == "toy" and answer.id.startswith("cmpl-")
    assert answer.usage.prompt_tokens == 7 and answer.usage.completion_tokens == len(result.ids)
    assert answer.usage.total_tokens == 7 + len(result.ids)


def test_streamed_text_is_the_whole_text_by_block(server):
    whole = server.complete(seed=7, max_tokens=24, **FAST)
    chunks = list(server.complete(seed=7, max_tokens=24, stream=True, stream_options={"include_usage": True}, **FAST))
    *pieces, last = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text
    assert len(pieces) > 2 and [c.choices[0].finish_reason for c in pieces][-1] == whole.choices[0].finish_reason
    assert all(chunk.choices[0].finish_reason is None for chunk in pieces[:-1])
    assert last.choices == [] and last.usage == whole.usage
    raw = server.post({"prompt": "ab", "stream": True, "max_tokens": 3, **FAST})
    assert raw.headers["content-type"].startswith("text/event-stream") and raw.text.endswith("data: [DONE]\n\n")
    assert "usage" not in raw.text


@pytest.mark.parametrize(
    ("prompt", "same"),
    [
        (["abc", "d"], ["abc", "d"]),
        ([97, 98, 99], ["abc"]),
        ([[97, 98, 99], [100]], ["abc", "d"]),
    ],
)
def test_every_kind_of_prompt_and_n(server, prompt, same):
    answer = server.complete(prompt, seed=3, n=2, **FAST)
    assert [choice.index for choice in answer.choices] == list(range(2 * len(same)))
    for choice in answer.choices:
        assert choice.seed == 3 + choice.index
        assert choice.text == generated(server, same[choice.index // 2], choice.seed, **FAST)[0]
    assert answer.usage.prompt_tokens == sum(map(len, same))
    streamed = [""] * len(answer.choices)
    for chunk in server.complete(prompt, seed=3, n=2, stream=True, **FAST):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in answer.choices]


def test_seeds_decide_whatever_else_runs(server):
    alone = {seed: server.complete(seed=seed, **FAST).choices[0].text for seed in range(6)}
    assert len(set(alone.values())) == 6
    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(server.complete, "x" * k, max_tokens=30 + k, **FAST) for k in range(1, 7)]
        again = {seed: pool.submit(server.complete, seed=seed, **FAST) for seed in alone}
        assert {seed: answer.result().choices[0].text for seed, answer in again.items()} == alone
        assert all(other.result().choices[0].text is not None for other in others)


def test_a_seed_that_was_not_given_is_returned(server):
    first, second = (server.complete(**FAST).choices[0] for _ in range(2))
    assert first.seed != second.seed
    assert server.complete(seed=first.seed, **FAST).choices[0].text == first.text


def test_sampler_fields_reach_the_sampler(server):
    settings = {"num_steps": 3, "guidance": 4.0, "guidance_mode": "logit", "grid": "logsnr", "noise_raise": 0.2}
    answer = server.complete(seed=1, temperature=1, top_p=1, **settings)
    assert answer.choices[0].text == generated(server, "abc def", 1, **settings)[0]
    assert answer.choices[0].text != server.complete(seed=1, **FAST).choices[0].text
    early = server.complete(seed=1, early_exit=0.5, early_exit_steps=2, **FAST).choices[0]
    assert early.text == generated(server, "abc def", 1, early_exit=0.5, early_exit_steps=2, **FAST)[0]


def test_stop_strings_and_echo(server):
    whole = server.complete(seed=2, max_tokens=40, **FAST).choices[0].text
    stop = whole[9:12]
    expected = whole[: whole.index(stop)]
    answer = server.complete(seed=2, max_tokens=40, stop=[stop, "never there"], **FAST)
    assert answer.choices[0].text == expected and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40  # the engine was told to go no further
    chunks = list(server.complete(seed=2, max_tokens=40, stop=stop, stream=True, echo=True, **FAST))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abc def" + expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_trace_shows_every_state(server):
    body = {"prompt": "abc def", "seed": 4, "max_tokens": 9, **FAST}
    lines = server.post(body, "/v1/bitlm/trace").text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    start, *items, end = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert (start["type"], start["seed"], start["num_steps"]) == ("start", 4, 4)
    text, result = generated(server, "abc def", 4, max_new_tokens=9, **FAST)
    blocks = [item for item in items if item["type"] == "block"]
    assert "".join(block["text"] for block in blocks) == text and end["usage"]["completion_tokens"] == len(result.ids)
    code = server.loaded.code
    for number, block in enumerate(blocks):
        states = [item for item in items if item["type"] == "states" and item["block"] == number]
        assert [state["time"] for state in states] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
        assert all(len(slot) == code.num_bits for state in states for slot in state["bits"])
        assert states[0]["num_known"] == (3 if number == 0 else 0)  # seven tokens: a block of four, and three more
        ids = code.decode(torch.tensor(states[-1]["bits"])).tolist()[states[-1]["num_known"] :]
        assert ids[: len(block["ids"])] == block["ids"] and len(block["tokens"]) == len(block["ids"])


def test_the_model_is_described(server):
    models = server.client.models.list().data
    assert [model.id for model in models] == ["toy"] and server.client.models.retrieve("toy").id == "toy"
    facts = models[0].bitlm
    assert (facts["output"], facts["block_size"], facts["num_bits"], facts["vocab_size"]) == ("diffusion", 4, 9, 258)
    assert facts["sampler"]["num_steps"] == 15
    assert server.http.get("/health").json() == {"status": "ok"}


def test_metrics_count(server):
    tokens = server.metric("bitlm_generated_tokens_total")
    requests = server.metric("bitlm_requests_total", path="/v1/completions", status="200") or 0
    answer = server.complete(seed=1, **FAST)
    text = server.http.get("/metrics").text
    assert server.metric("bitlm_generated_tokens_total") - tokens == answer.usage.completion_tokens
    assert server.metric("bitlm_requests_total", path="/v1/completions", status="200") == requests + 1
    for name in ("queue_length", "batch_size", "block_seconds_bucket", "request_seconds_count", "first_block_seconds"):
        assert f"bitlm_{name}" in text
