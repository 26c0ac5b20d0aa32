"""A run that is asked to stop saves, says so with its exit status, and goes on later as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_bitlm.errors import STOP_EXIT_STATUS
from megatron_bitlm.training.signals import StopRequest
from tests.distributed_harness import run_ranks
from tests.training_runs import read_metrics, run_config, train

NUM_STEPS = 40


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, dataset) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    train(directory, dataset, training__num_steps=NUM_STEPS, checkpoint__interval_steps=0)
    return directory


def start(directory: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "megatron_bitlm.cli", "pretrain", str(directory.with_name("run.yaml"))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(process: subprocess.Popen, directory: Path, step: int) -> None:
    deadline, file = time.monotonic() + 120, directory / "metrics.jsonl"
    while not (file.exists() and len(file.read_text().splitlines()) >= step):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "num_workers"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 1)], ids=["usr1", "term"])
def test_a_stopped_run_exits_with_75_and_resumes_bit_for_bit(tmp_path, dataset, uninterrupted, number, num_workers):
    directory = tmp_path / "run"
    settings = {"training__num_steps": NUM_STEPS, "checkpoint__interval_steps": 0, "training__progress": "lines"}
    run_config(directory, dataset, **settings, data__num_workers=num_workers)
    process = start(directory)
    wait_for_step(process, directory, 3)
    # As a scheduler does it: every process of the job is signalled, data loaders too, and more than once.
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(family) > num_workers
    for _ in range(2):
        for member in family:
            if member.is_running():
                member.send_signal(number)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == STOP_EXIT_STATUS == 75, output
    stopped = read_metrics(directory)[-1]["step"]
    assert 3 <= stopped < NUM_STEPS
    assert f"stops at step {stopped} " in output
    assert (directory / "checkpoints" / "latest").read_text().strip() == f"step_{stopped:08d}"

    process = start(directory)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"at step {stopped}" in output
    assert read_metrics(directory) == read_metrics(uninterrupted)


def test_a_request_before_the_first_step_saves_nothing(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(StopRequest, "agreed", lambda self, device: True)
    outcome = train(tmp_path / "run", dataset)
    assert (outcome.stopped, outcome.finished, outcome.step) == (True, False, 0)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_handlers_go_with_the_run():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGUSR1) != before[1]
        assert stop.requested is None
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def stop_of_one_rank(asked: int) -> list[bool]:
    from megatron_bitlm.parallel.state import ParallelConfig, initialize_parallel, shutdown_parallel

    state = initialize_parallel(ParallelConfig(), seed=0)
    with StopRequest() as stop:
        answers = [stop.agreed(state.device)]
        if state.rank == asked:
            os.kill(os.getpid(), signal.SIGUSR1)
        answers.append(stop.agreed(state.device))
    shutdown_parallel()
    return answers


def test_ranks_agree_when_one_of_them_was_asked():
    assert run_ranks(stop_of_one_rank, 2, 1) == [[False, True]] * 2
