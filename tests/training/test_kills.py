"""A few of the kills of tools/kill_test.py: in a save, at a step, at a start; the whole series is run by hand."""

import os
from pathlib import Path

from megatron_bitlm.config import load_run
from tests.training_runs import start_run
from tools.kill_test import run_kill_test


class Forked:
    """`bitlm pretrain` in a process that need not import everything anew."""

    def __init__(self, config: Path, log: Path) -> None:
        self.process = start_run(load_run(str(config)))

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode


def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_not(tmp_path):
    report = run_kill_test(tmp_path / "test", num_kills=3, num_steps=45, save_interval=4, seed=3, start=Forked)
    assert [kill.aim for kill in report.kills] == ["save", "step", "save"]
    assert report.kills[-1].newest > 0 and any(kill.in_a_save for kill in report.kills)
    assert report.num_tensors > 50
    assert report.differing_tensors == [] and report.differing_records == 0
