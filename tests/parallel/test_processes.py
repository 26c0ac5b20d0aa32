"""Helper processes end with the process that started them, however that ended."""

import os
import signal
import subprocess
import sys
import time

CHECKPOINT_QUEUE = """
import time
from megatron_bitlm.parallel.mends import install_mends
from megatron.core.dist_checkpointing.strategies import filesystem_async
if __name__ == "__main__":
    install_mends()
    queue = filesystem_async._get_write_results_queue()
    queue.put(1)
    print(queue._manager._process.pid, queue.get(), flush=True)
    time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_checkpoint_queue_does_not_outlive_a_kill(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CHECKPOINT_QUEUE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    pid, got = (int(word) for word in process.stdout.readline().split())
    assert got == 1 and is_running(pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(pid)
