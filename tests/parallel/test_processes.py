"""Helper processes end with the process that started them, however that ended, and send back what they found."""

import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import time

import pytest

from megatron_bitlm.parallel.processes import Outbox

FORKING = """
import multiprocessing, os, time
from megatron_bitlm.parallel.processes import end_with_parent

def wait():
    end_with_parent()
    time.sleep(600)

if __name__ == "__main__":
    process = multiprocessing.get_context("fork").Process(target=wait)
    process.start()
    print(process.pid, flush=True)
    time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_forked_process_does_not_outlive_a_kill(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FORKING)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert is_running(pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(pid)


def fork_and_join(target, *arguments) -> None:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join()


def test_an_outbox_brings_what_a_pipe_would_block_on() -> None:
    outbox = Outbox()
    fork_and_join(outbox.put, {"bytes": b"x" * 5_000_000})
    assert outbox.get_nowait() == {"bytes": b"x" * 5_000_000}


def die(outbox: Outbox) -> None:
    outbox._file.write(b"\x80\x04half of a pickle")
    outbox._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("target", [len, die])
def test_an_outbox_is_empty_when_its_writer_put_nothing_or_was_killed(target) -> None:
    outbox = Outbox()
    fork_and_join(target, outbox)
    with pytest.raises(queue.Empty):
        outbox.get_nowait()
