"""Running a study's runs: one after the other here, or one each in the tasks of a Slurm array."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_bitlm.errors import STOP_EXIT_STATUS, BitLMError
from megatron_bitlm.scaling.collect import is_finished
from megatron_bitlm.scaling.plan import PlannedRun, config_file


def run_queue(folder: Path, runs: Sequence[PlannedRun], say: Callable[[str], None]) -> None:
    """Train what is not finished, cheapest first; finished runs are left alone, interrupted ones resumed.

    Args:
        folder: Of the study.
        runs: Of its plan, or some of them.
        say: Told of every run.

    Raises:
        BitLMError: Runs failed; the others were still trained. Or the queue was asked to stop.
    """
    failed = []
    for number, run in enumerate(sorted(runs, key=lambda run: run.flops), 1):
        if is_finished(folder, run):
            say(f"{number}/{len(runs)} {run.name}: finished before")
            continue
        say(f"{number}/{len(runs)} {run.name}: {run.num_steps} steps, {run.flops:.3g} FLOPs")
        command = [sys.executable, "-m", "megatron_bitlm.cli", "pretrain", str(config_file(folder, run))]
        status = subprocess.run(command, check=False).returncode
        if status in (STOP_EXIT_STATUS, 130) or status < 0:
            raise BitLMError(f"{run.name} was asked to stop; repeat the command to go on with it")
        if status:
            failed.append(run.name)
    if failed:
        raise BitLMError(f"{len(failed)} runs failed: {', '.join(failed)}; their messages are above")
