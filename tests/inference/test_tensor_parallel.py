"""Decoding by two processes that share a model, against one: the same ids, printed once."""

import contextlib
import io
import json
import os

import pytest
import torch

from megatron_bitlm.cli import main
from tests.distributed_harness import free_port, run_ranks
from tests.training_runs import corpus, make_dataset, train

SAMPLERS = {
    "diffusion": [["--steps", "4", "--guidance", "2"], ["--steps", "6", "--early-exit", "0.3", "--noise-raise", "0.2"]],
    "softmax": [["--temperature", "0.8"]],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    prefix = make_dataset(folder, "docs", corpus())
    for output in SAMPLERS:
        train(
            folder / output,
            prefix,
            training__num_steps=6,
            optimizer__warmup_steps=1,
            optimizer__learning_rate=0.005,
            model__output=output,
            model__head__parameterization="matched_filter",
        )
    return folder


def outputs(folder, ports=None) -> list[str]:
    """What every command prints in this process; run on each rank, where every command meets at a port of its own."""
    torch.set_num_threads(1)
    printed = []
    for kind, samplers in SAMPLERS.items():
        for sampler in samplers:
            if ports:
                os.environ["MASTER_PORT"] = str(ports[len(printed)])
            arguments = ["generate", "--checkpoint", str(folder / kind), "--prompt", "ab", "", "hello you"]
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                assert main([*arguments, "--max-new-tokens", "18", "--json", *sampler]) == 0
            printed.append(stream.getvalue())
    return printed


def test_two_processes_decode_what_one_decodes(runs):
    alone = outputs(runs)
    first, second = run_ranks(outputs, 2, runs, [free_port() for _ in alone])
    assert first == alone and second == [""] * len(alone)
    for text in alone:
        assert len({tuple(json.loads(line)["ids"]) for line in text.splitlines()}) == 3


def refusal(folder) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        assert main(["generate", "--checkpoint", str(folder / "diffusion"), "--prompt-file", "-"]) == 2
    return stream.getvalue()


def test_standard_input_is_not_shared(runs):
    for sentence in run_ranks(refusal, 2, runs):
        assert "2 processes do not share; name a file" in sentence
