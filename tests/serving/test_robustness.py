"""Clients that leave, steps that raise, signals: the others unharmed, the server goes on or ends in order."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

ROOT = Path(__file__).resolve().parents[2]
FAST = {"num_steps": 2, "guidance": 1.0}


def test_a_hundred_clients_of_which_some_leave(server):
    """Streaming and whole; a third of them leave early, and the others get the text they would have had alone."""
    alone = {seed: server.complete(seed=seed, max_tokens=16, **FAST).choices[0].text for seed in range(4)}
    before = server.metric("bitlm_disconnects_total")

    async def client(http, number):
        body = {"prompt": "abc def", "seed": number % 4, "max_tokens": 16, "stream": number % 2 == 0, **FAST}
        if number % 3 == 0:  # leaves, some before anything has come
            body |= {"max_tokens": 400, "num_steps": 20}
            try:
                async with http.stream("POST", "/v1/completions", json=body, timeout=0.2 + 0.01 * number) as answer:
                    async for _ in answer.aiter_bytes():
                        return None
            except httpx.TimeoutException:
                return None
        answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        if not body["stream"]:
            return answer.json()["choices"][0]["text"]
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines)

    async def all_of_them():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=120) as http:
            return await asyncio.gather(*(client(http, number) for number in range(100)))

    texts = asyncio.run(all_of_them())
    for number, text in enumerate(texts):
        assert text == (None if number % 3 == 0 else alone[number % 4])
    server.wait_for(lambda: not server.service.worker.engine.has_work)
    assert server.service.worker._num_open == 0 and server.metric("bitlm_disconnects_total") >= before + 30
    assert server.complete(seed=1, max_tokens=16, **FAST).choices[0].text == alone[1]


def test_a_client_that_leaves_frees_its_row(server):
    stream = server.complete("abc", stream=True, max_tokens=500, num_steps=30)
    next(iter(stream))
    tokens = server.metric("bitlm_generated_tokens_total")
    stream.close()
    server.wait_for(lambda: not server.service.worker.engine.has_work)
    assert server.metric("bitlm_generated_tokens_total") - tokens < 400


def test_a_step_that_raises_fails_its_requests_only(server, monkeypatch):
    decoder = server.service.worker.engine.decoder
    original, failing = decoder.realise, [True]

    def realise(condition, rows, observe):
        if failing and any(row.request.seed == 13 for row in rows):
            failing.pop()
            raise RuntimeError("this step was made to fail")
        return original(condition, rows, observe)

    expected = server.complete(seed=2, **FAST).choices[0].text
    monkeypatch.setattr(decoder, "realise", realise)
    failed = server.post({"prompt": "abc", "seed": 13, **FAST})
    assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
    assert "made to fail" not in failed.text
    failing.append(True)
    with pytest.raises(openai.APIError, match="failed while it decoded"):
        list(server.complete(seed=13, stream=True, **FAST))
    assert server.complete(seed=2, **FAST).choices[0].text == expected
    assert server.http.get("/health").status_code == 200 and server.metric("bitlm_failed_steps_total") == 2
    monkeypatch.setattr(decoder, "realise", lambda *_: 1 / 0)
    assert [server.post({"prompt": "a"}).status_code for _ in range(3)] == [500] * 3
    assert server.http.get("/health").status_code == 503
    monkeypatch.undo()
    assert server.complete(seed=2, **FAST).choices[0].text == expected
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("grace_seconds", [0, 30])
def test_the_command_serves_and_ends_on_sigterm(bitlm_run, tmp_path, grace_seconds):
    """With time, what runs is finished; without, it is cut; both end with status 0."""
    (tmp_path / "key").write_text("secret\n")
    arguments = [
        "serve",
        str(bitlm_run),
        "--port",
        "0",
        "--api-key-file",
        str(tmp_path / "key"),
        "--max-context",
        "300",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_bitlm.cli", *arguments, "--grace-seconds", str(grace_seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        line = process.stdout.readline()
        url = re.fullmatch(r"serving toy \(step 8\) at (http://127\.0\.0\.1:\d+)/\n", line).group(1)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        extra = {"num_steps": 30 if grace_seconds == 0 else 4}
        stream = client.completions.create(
            model="toy", prompt="abc", max_tokens=200, stream=True, seed=1, extra_body=extra
        )
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        if grace_seconds:
            assert list(stream)[-1].choices[0].finish_reason is not None
        assert process.wait(60) == 0, process.stderr.read()
        assert time.monotonic() - start < 60
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")
    finally:
        process.kill()
        process.communicate()


def test_the_load_script_loses_nothing(server):
    script = [sys.executable, str(ROOT / "tools/load_test.py"), server.url, "--clients", "4", "--seconds", "1.5"]
    done = subprocess.run([*script, "--max-tokens", "8", "--pause", "0.1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["lost"] == 0 and figures["completions"] >= 4 and figures["malformed_refused"] >= 4
    assert 0 < figures["first_block_s"]["p50"] <= figures["whole_s"]["p50"] <= figures["whole_s"]["max"]
