"""Bad input on the wire: a 4xx with one sentence that names the field, and a server that goes on."""

import http.client
import json
import re

import openai
import pytest

from megatron_bitlm.cli import main
from megatron_bitlm.serving.command import is_loopback, read_key
from tests.serving.conftest import KEY, serving

LIMITS = ("--max-context", "64", "--max-new-tokens", "40", "--max-choices", "4", "--max-body-bytes", "4096")


@pytest.fixture(scope="module")
def server(bitlm_run):
    with serving(bitlm_run, *LIMITS, "--max-queue", "2", "--max-batch-size", "2", api_key=KEY) as running:
        running.http.headers["authorization"] = f"Bearer {KEY}"
        yield running
        assert running.complete("abc", num_steps=2).choices[0].text is not None


BAD_FIELDS = [
    ({}, "prompt", "prompt is missing"),
    ({"prompt": ""}, "prompt", "prompt is empty"),
    ({"prompt": []}, "prompt", "prompt is empty"),
    ({"prompt": ["a", ""]}, "prompt", "prompt is empty"),
    ({"prompt": [[1], []]}, "prompt", "prompt is empty"),
    ({"prompt": 3}, "prompt", "prompt must be a string"),
    ({"prompt": ["a", 1]}, "prompt", "prompt must be a string"),
    ({"prompt": [True]}, "prompt", "prompt must be a string"),
    ({"prompt": "\ud800"}, "prompt", "half of a surrogate pair"),
    ({"prompt": [1, 258]}, "prompt", "prompt id 258 is outside the vocabulary of 258"),
    ({"prompt": [[5], [-1]]}, "prompt", "prompt id -1 is outside"),
    ({"prompt": [10**30]}, "prompt", "is outside the vocabulary"),
    ({"prompt": "a" * 70}, "prompt", "70 tokens and max_tokens 16 are more than the context of 64"),
    ({"prompt": "a" * 30, "max_tokens": 35}, "prompt", "shorten the prompt or lower max_tokens"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", r"max_tokens must lie in \[1, 40\], got 0"),
    ({"prompt": "a", "max_tokens": 41}, "max_tokens", "got 41"),
    ({"prompt": "a", "max_tokens": "9"}, "max_tokens", 'must be an integer, got "9"'),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "must be an integer"),
    ({"prompt": "a", "n": 0}, "n", "n must be at least 1, got 0"),
    ({"prompt": ["a", "b"], "n": 3}, "n", "are 6 completions, more than the 4 of one request"),
    ({"prompt": "a", "seed": -1}, "seed", "seed must lie in"),
    ({"prompt": "a", "seed": 2**63}, "seed", "seed must lie in"),
    ({"prompt": "a", "guidance": -0.5}, "guidance", "guidance must be a number >= 0, got -0.5"),
    ({"prompt": "a", "guidance": True}, "guidance", "guidance must be a number"),
    ({"prompt": "a", "guidance_mode": "loud"}, "guidance_mode", "unknown guidance_mode 'loud'"),
    ({"prompt": "a", "num_steps": 0}, "num_steps", "num_steps must be at least 1, got 0"),
    ({"prompt": "a", "num_steps": 257}, "num_steps", r"num_steps must lie in \[1, 256\]"),
    ({"prompt": "a", "grid": "chess"}, "grid", "unknown grid 'chess'"),
    ({"prompt": "a", "noise_raise": 2}, "noise_raise", "noise_raise must lie in"),
    ({"prompt": "a", "early_exit": 0}, "early_exit", "early_exit must be a number > 0"),
    ({"prompt": "a", "temperature": 0.7}, "temperature", "shape its sampling with num_steps, guidance"),
    ({"prompt": "a", "top_p": 0.5}, "top_p", "does not apply"),
    ({"prompt": "a", "stop": ["x", 3]}, "stop", "stop must be"),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop", "at most 16"),
    ({"prompt": "a", "stream": "yes"}, "stream", "stream must be true or false"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"prompt": "a", "logprobs": 5}, "logprobs", "logprobs 5 is not supported"),
    ({"prompt": "a", "guidence": 2}, "guidence", "unknown field 'guidence'"),
    ({"prompt": "a", "model": "gpt"}, "model", "there is no model 'gpt' here"),
]


def test_a_bad_field_is_named(server):
    for number, (body, param, words) in enumerate(BAD_FIELDS):
        # With halves of surrogate pairs as JSON spells them, which httpx would not send.
        path, headers = ("/v1/completions", "/v1/bitlm/trace")[number % 2], {"content-type": "application/json"}
        answer = server.http.post(path, content=json.dumps(body).encode(), headers=headers)
        error = answer.json()["error"]
        assert answer.status_code == (404 if param == "model" else 400)
        assert error["param"] == param and set(error) == {"message", "type", "param", "code"}
        assert re.search(words, error["message"]) and "\n" not in error["message"]


def test_fields_of_openai_at_their_defaults_are_taken(server):
    settings = {
        "temperature": 1,
        "top_p": 1.0,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "best_of": 1,
        "user": "u",
    }
    answer = server.post({"prompt": "a", "n": 1, "suffix": None, "logprobs": None, "num_steps": 2, **settings})
    assert answer.status_code == 200, answer.text


MALFORMED = [
    (b"", "not valid JSON"),
    (b'{"prompt": "a"', "not valid JSON"),
    (b'{"prompt": "\xff"}', "not valid JSON"),
    (b'{"prompt": "a", "guidance": NaN}', "NaN is no JSON number"),
    (b'["a"]', "must be a JSON object"),
    (b"[" * 4000, "JSON"),
    (b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}", "seed|JSON"),
    (b'{"prompt": "a", "guidance": 1e999}', "finite"),
]


def test_malformed_json(server):
    for content, words in MALFORMED:
        answer = server.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert re.search(words, answer.json()["error"]["message"])


def test_bodies_over_the_limit_are_refused_while_they_come(server):
    within = server.post({"prompt": "a", "num_steps": 2, "user": "x" * 4000})
    assert within.status_code == 200
    for size in (4096, 10_000, 3_000_000):
        body = b'{"prompt": "' + b"a" * size + b'"}'
        answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    answer = server.http.post(  # chunked: no length is announced
        "/v1/completions", content=iter([b"a" * 3000] * 3), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413


def test_other_content_routes_and_methods(server):
    assert server.http.post("/v1/completions", data={"prompt": "a"}).status_code == 415
    for answer, status in (
        (server.http.get("/v1/nothing"), 404),
        (server.http.get("/v1/completions"), 405),
        (server.http.get("/docs"), 404),
        (server.http.get("/v1/models/other"), 404),
    ):
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_wrong_key_is_refused(server):
    wrong = [None, b"", b"Bearer", b"Bearer wrong", f"Basic {KEY}".encode(), f"Bearer {KEY}x".encode(), b"Bearer \xe9"]
    for given in wrong:
        for path in ("/v1/models", "/v1/models/toy", "/metrics"):
            headers = [] if given is None else [(b"Authorization", given)]
            status, answer_headers, body = bare_get(server.url, path, headers)
            assert status == 401 and answer_headers["www-authenticate"] == "Bearer"
            assert json.loads(body)["error"]["type"] == "authentication_error"
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.completions.create(model="toy", prompt="a")
    assert bare_get(server.url, "/health", [])[0] == 200


def bare_get(url, path, headers):
    """A GET with these headers as they are, in bytes."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.putrequest("GET", path)
    for name, value in headers:
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    result = answer.status, answer.headers, answer.read()
    connection.close()
    return result


def test_a_full_queue_is_429(server):
    streams = [server.complete("ab", stream=True, max_tokens=40, n=1, num_steps=200) for _ in range(4)]
    with pytest.raises(openai.RateLimitError, match="queue is full"):
        server.complete("abc")
    for stream in streams:
        stream.close()
    server.wait_for(lambda: server.service.worker._num_open == 0)
    assert server.complete("abc", num_steps=2).choices[0].finish_reason


def refuses(capsys, *arguments, message):
    assert main(["serve", *map(str, arguments)]) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed) and printed.count("\n") == 1


def test_the_command_refuses_before_it_loads(bitlm_run, tmp_path, capsys, monkeypatch, server):
    monkeypatch.delenv("BITLM_API_KEY", raising=False)
    empty = tmp_path / "empty"
    empty.write_text("\n")
    refuses(capsys, bitlm_run, "--host", "0.0.0.0", message="--host 0.0.0.0 is reached from other machines")
    refuses(capsys, bitlm_run, "--api-key-file", tmp_path / "none", message="cannot read --api-key-file")
    refuses(capsys, bitlm_run, "--api-key-file", empty, message="holds no key")
    refuses(capsys, bitlm_run, "--max-batch-size", "0", message="--max-batch-size must be at least 1, got 0")
    refuses(capsys, bitlm_run, "--port", "70000", message="--port must be at most 65535")
    port = server.url.rpartition(":")[2]
    refuses(capsys, bitlm_run, "--port", port, message=f"cannot listen on 127.0.0.1 port {port}")
    refuses(capsys, tmp_path / "nowhere", "--port", "0", message="nowhere")


def test_keys_and_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLM_API_KEY", " from-the-environment ")
    assert read_key(None) == "from-the-environment"
    (tmp_path / "key").write_text("from-a-file\n")
    assert read_key(str(tmp_path / "key")) == "from-a-file"
    monkeypatch.delenv("BITLM_API_KEY")
    assert read_key(None) is None
    assert all(map(is_loopback, ("127.0.0.1", "127.8.0.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org")))
