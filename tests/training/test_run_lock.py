"""Two processes never train in one folder, and a process that is gone is never in the way."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.training import run_lock
from megatron_bitlm.training.run_lock import RunLock
from tests.training_runs import train

HOLDER = """
import os, sys, time
from pathlib import Path
from megatron_bitlm.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
child = os.fork()  # as the writer of a checkpoint, it must not hold the lock when its parent is gone
if child:
    print(child, flush=True)
time.sleep(600)
"""


@pytest.fixture
def hold():
    """Starts a process that holds a lock, and one forked from it; both are ended after the test."""
    started: list[int] = []

    def start(path: Path) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True, env=environment
        )
        started.extend([process.pid, int(process.stdout.readline())])
        return process

    yield start
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_second_process_is_refused_and_told_whose_folder_it_is(tmp_path, hold, dataset, monkeypatch):
    path = tmp_path / "run" / "lock"
    path.parent.mkdir()
    process = hold(path)
    lock = RunLock(path)
    with pytest.raises(BitLMError, match=f"run is in use by process {process.pid} on ") as refused:
        lock.acquire(patience_s=0)
    assert str(path.parent) in str(refused.value)
    monkeypatch.setattr(run_lock, "_PATIENCE_S", 0)
    with pytest.raises(BitLMError, match=f"in use by process {process.pid}"):
        train(path.parent, dataset, training__num_steps=4)
    assert os.listdir(path.parent) == ["lock"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    lock.acquire(patience_s=0)  # though the process it forked still runs
    assert f'"pid": {os.getpid()}' in path.read_text()
    lock.release()


def test_a_file_system_without_locks_is_said_to_be_one(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(run_lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", unsupported)
    RunLock(tmp_path / "lock").acquire()
    assert "cannot be locked on this file system" in capsys.readouterr().err


def test_a_run_lets_go_of_its_folder(tmp_path, dataset):
    train(tmp_path / "run", dataset, training__num_steps=4)
    command = "import sys; from pathlib import Path; from megatron_bitlm.training.run_lock import RunLock; "
    command += "RunLock(Path(sys.argv[1])).acquire(patience_s=0)"
    subprocess.run([sys.executable, "-c", command, tmp_path / "run" / "lock"], check=True)
