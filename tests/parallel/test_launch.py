"""The launcher ends a job soon when a rank dies, starts it again where that helps, and says how it ended."""

import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from megatron_bitlm.errors import DIVERGED_EXIT_STATUS, STOP_EXIT_STATUS
from megatron_bitlm.parallel.launch import exit_status
from megatron_bitlm.training.trainer import pretrain
from tests.distributed_harness import free_port, run_ranks
from tests.training_runs import checkpoint_tensors, corpus, make_dataset, read_metrics, run_config

SETTINGS = {"training__num_steps": 6, "checkpoint__interval_steps": 1, "validation__interval_steps": 0}
SETTINGS |= {"training__progress": "lines"}


@pytest.mark.parametrize(
    ("workers", "received", "status"),
    [
        ({0: 75}, [], 75),
        ({1: 75, 0: 75}, [10], 75),
        ({0: -10}, [10], 75),
        ({0: -15}, [], 143),
        ({0: -9}, [10], 137),
        ({0: 1}, [15], 1),
        ({0: 1, 1: 65}, [], 65),
        ({0: 1, 1: 124}, [], 124),
        ({0: -14}, [], 124),
        ({0: 2}, [], 2),
    ],
)
def test_the_launcher_keeps_the_status_of_its_workers(workers, received, status):
    assert exit_status(workers, received) == status


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), "docs", corpus())


def command(fault: str, directory, *options: str) -> list[str]:
    launcher = [sys.executable, "-m", "megatron_bitlm.parallel.launch", *options]
    return [*launcher, "-m", "tests.training.hang_run", fault, str(directory.with_name(f"{directory.name}.yaml"))]


def launch(fault: str, directory, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(fault, directory, *options), capture_output=True, text=True, timeout=300)


def train_whole(config) -> None:
    torch.set_num_threads(1)
    pretrain(config)


def launch_script(tmp_path, text: str, *options: str) -> subprocess.CompletedProcess:
    """One worker that runs a few lines, instead of training."""
    script = tmp_path / "worker.py"
    script.write_text(f"import os, signal, sys\nprint('started', flush=True)\n{text}\n")
    command = [sys.executable, "-m", "megatron_bitlm.parallel.launch", "--nproc-per-node=1", *options, str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_killed_ranks_are_started_again_from_the_newest_checkpoint(tmp_path, prefix):
    whole, directory = tmp_path / "whole", tmp_path / "run"
    run_ranks(train_whole, 2, run_config(whole, prefix, **SETTINGS))
    run_config(directory, prefix, **SETTINGS)
    directory.with_suffix(".deaths").write_text("x")
    ended = launch("die", directory, "--nproc-per-node=2", "--max-restarts=1")
    assert ended.returncode == 0, ended.stderr
    first = "rank 1 was killed by SIGKILL; all workers start again from the newest checkpoint (restart 1 of 1)\n"
    assert ended.stderr.count(first) == 1
    assert re.findall(rf"resumed {directory} at step [12]\n", ended.stdout)
    assert read_metrics(directory) == read_metrics(whole)
    ours, theirs = checkpoint_tensors(directory, 6), checkpoint_tensors(whole, 6)
    assert len(ours) > 50 and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_workers_are_started_again_only_as_often_as_allowed(tmp_path):
    ended = launch_script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", "--max-restarts=1")
    assert ended.returncode == 128 + signal.SIGKILL
    assert ended.stdout.count("started") == 2
    assert "rank 0 was killed by SIGKILL; the run ends\n" in ended.stderr


@pytest.mark.parametrize("status", [DIVERGED_EXIT_STATUS, STOP_EXIT_STATUS, 2])
def test_a_run_that_ended_for_good_is_not_started_again(tmp_path, status):
    ended = launch_script(tmp_path, f"sys.exit({status})", "--max-restarts=3")
    assert ended.returncode == status
    assert ended.stdout.count("started") == 1 and "start again" not in ended.stderr


def test_two_nodes_start_again_together(tmp_path, prefix):
    directory = tmp_path / "run"
    run_config(directory, prefix, **SETTINGS)
    endpoint = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=pair", "--max-restarts=1"]
    directory.with_suffix(".deaths").write_text("x")
    commands = [command("die", directory, *options, endpoint, f"--rdzv-conf=is_host={host}") for host in (1, 0)]
    nodes = [subprocess.Popen(node, stderr=subprocess.PIPE, text=True) for node in commands]
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum("killed by SIGKILL; all workers start again" in text for text in said) == 1
    assert [record["step"] for record in read_metrics(directory)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_asked_to_stop_is_not_started_again(tmp_path, prefix):
    directory = tmp_path / "run"
    run_config(directory, prefix, **{**SETTINGS, "training__num_steps": 2000, "checkpoint__interval_steps": 0})
    process = subprocess.Popen(
        command("die", directory, "--nproc-per-node=2", "--max-restarts=3"), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while not (directory / "metrics.jsonl").exists() or len((directory / "metrics.jsonl").read_text()) == 0:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert len(psutil.Process(process.pid).children()) == 2
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=200)
    assert process.returncode == STOP_EXIT_STATUS, said
    assert "start again" not in said
    stopped = read_metrics(directory)[-1]["step"]
    assert (directory / "checkpoints" / "latest").read_text() == f"step_{stopped:08d}\n"
