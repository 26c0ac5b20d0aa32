"""A rank that hangs ends the run soon, with the stacks of all ranks and a status that says what happened."""

import math
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_bitlm.errors import HANG_EXIT_STATUS, BitLMError
from megatron_bitlm.training.watchdog import Watchdog, WatchdogConfig
from tests.training_runs import read_metrics, run_config

# A loaded machine takes long for a start, and a step that hangs takes for ever.
TIMEOUTS = {"watchdog__start_timeout_s": 200.0, "watchdog__step_timeout_s": 6.0, "watchdog__grace_s": 3.0}


def launched(
    what: str, directory, *, num_ranks: int = 1, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m"]
    if num_ranks > 1:
        start += ["megatron_bitlm.parallel.launch", f"--nproc-per-node={num_ranks}", "-m"]
    command = [*start, "tests.training.hang_run", what, str(directory.with_name("run.yaml"))]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_all_ranks_write_their_stacks_when_one_hangs(tmp_path, dataset):
    directory = tmp_path / "run"
    run_config(directory, dataset, **TIMEOUTS, training__num_steps=5)
    ended = launched("hang", directory, num_ranks=2)
    assert ended.returncode == HANG_EXIT_STATUS == 124, ended.stderr
    stacks = [(directory / "stacks" / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert "sleep_for_ever" in stacks[1] and "hang_run.py" in stacks[1]
    assert "sleep_for_ever" not in stacks[0] and "in _one_step" in stacks[0]  # it waits for the other's gradients
    assert all("in _watch" in text for text in stacks)  # all threads
    for rank in range(2):
        assert f"rank {rank} made no progress for 6 s in phase step; stacks" in ended.stderr
    assert "sleep_for_ever" in ended.stderr
    assert "ended with exit status 124" in ended.stderr
    assert [record["step"] for record in read_metrics(directory)] == [1, 2]


def test_a_thread_that_keeps_the_interpreter_to_itself_is_killed_and_seen(tmp_path, dataset):
    directory = tmp_path / "run"
    run_config(directory, dataset, **{**TIMEOUTS, "watchdog__grace_s": 0.0})
    ended = launched("lock", directory)
    assert ended.returncode == -signal.SIGALRM, ended.stderr
    assert "sleep_with_the_lock" in (directory / "stacks" / "rank_0.txt").read_text()


def test_a_quick_process_leaves_nothing_and_keeps_its_alarm_off(tmp_path):
    before = threading.active_count()
    with Watchdog(
        WatchdogConfig(step_timeout_s=0.2, grace_s=0.0), tmp_path / "run" / "stacks" / "rank_0.txt", 0
    ) as dog:
        dog.phase("step")
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 5.2
        dog.phase("checkpoint")
        time.sleep(0.5)  # longer than a step may take
        assert threading.active_count() == before + 1
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert list(tmp_path.iterdir()) == []


def test_no_timeout_is_no_alarm(tmp_path):
    with Watchdog(WatchdogConfig(start_timeout_s=0), tmp_path / "stacks" / "rank_0.txt", 0):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_settings_out_of_range_are_named(value):
    with pytest.raises(BitLMError, match=f"watchdog.step_timeout_s must be finite and not negative, got {value}"):
        WatchdogConfig(step_timeout_s=value).validate()
