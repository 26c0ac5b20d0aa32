"""Tiny trained models, and servers of them in a thread of this process."""

import threading
import time
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch
import uvicorn

from megatron_bitlm.inference.generate import Generator, TokenGenerator
from megatron_bitlm.inference.load import loaded_model
from megatron_bitlm.method.sampler import SamplerConfig
from megatron_bitlm.method.token_sampling import TokenSamplerConfig
from megatron_bitlm.serving.app import build_app
from megatron_bitlm.serving.command import _parser
from megatron_bitlm.serving.service import make_service
from tests.training_runs import corpus, make_dataset, train

KEY = "a-key-for-tests"


class LocalServer:
    """A server on a free port of this machine, and clients of it."""

    def __init__(self, loaded, checkpoint, *arguments, api_key=None):
        options = _parser().parse_args([str(checkpoint), *arguments])
        self.loaded, self.service = loaded, make_service(loaded, options, api_key)
        config = uvicorn.Config(build_app(self.service), host="127.0.0.1", port=0, log_level="warning")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.005)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.service.api_key or "none", max_retries=0)
        return self

    def __exit__(self, *_):
        self.http.close()
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def complete(self, prompt="abc def", **settings):
        """The openai client's answer; settings that it does not know go through extra_body."""
        known = {"max_tokens", "n", "seed", "stream", "stop", "echo", "stream_options", "temperature", "top_p", "model"}
        extra = {name: settings.pop(name) for name in list(settings) if name not in known}
        settings = {"model": self.service.model.name, "max_tokens": 12} | settings
        return self.client.completions.create(prompt=prompt, extra_body=extra, **settings)

    def post(self, body, path="/v1/completions", **options):
        """The bare answer to a JSON body."""
        return self.http.post(path, json=body, **options)

    def metric(self, name, **labels):
        """A figure of /metrics."""
        return self.service.metrics.registry.get_sample_value(name, labels)

    def wait_for(self, condition, timeout_s=30):
        """Until something comes true in another thread."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "it never came true"
            time.sleep(0.005)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    torch.set_num_threads(1)
    return make_dataset(tmp_path_factory.mktemp("serving-data"), "docs", corpus())


@pytest.fixture(scope="session")
def bitlm_run(tmp_path_factory, dataset):
    run = tmp_path_factory.mktemp("serving") / "toy"
    train(run, dataset, training__num_steps=8, validation__interval_steps=8, optimizer__learning_rate=2e-2)
    return run


@pytest.fixture(scope="session")
def softmax_run(tmp_path_factory, dataset):
    run = tmp_path_factory.mktemp("serving") / "baseline"
    train(run, dataset, training__num_steps=8, validation__interval_steps=8, model__output="softmax")
    return run


@contextmanager
def serving(run, *arguments, api_key=None):
    """A server of a run's newest checkpoint."""
    with loaded_model(run) as loaded, LocalServer(loaded, run, *arguments, api_key=api_key) as server:
        yield server


@pytest.fixture(scope="module")
def server(bitlm_run):
    """A server of the BitLM; its context is longer than in training, so that there is time to interrupt it."""
    with serving(bitlm_run, "--max-context", "600", "--max-new-tokens", "512") as running:
        yield running


def generated(server, prompt, seed, max_new_tokens=12, **sampler):
    """What the generator makes of it, decoded behind the prompt."""
    loaded = server.loaded
    if loaded.config.output == "softmax":
        generator = TokenGenerator(loaded.model, sampler=TokenSamplerConfig(**sampler))
    else:
        config = SamplerConfig(**sampler)
        generator = Generator(loaded.model, loaded.code, bos_id=loaded.bos_id, eos_id=loaded.eos_id, sampler=config)
    ids = loaded.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    result = generator.generate([ids], max_new_tokens=max_new_tokens, seeds=[seed])[0]
    return loaded.tokenizer.decode([*ids, *result.ids])[len(loaded.tokenizer.decode(ids)) :], result
