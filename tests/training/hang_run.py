"""`bitlm pretrain` with ranks that die or hang: python -m tests.training.hang_run WHAT CONFIG.yaml."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_bitlm.cli import main
from megatron_bitlm.training.step import TrainingStep

STEP = 3


def sleep_for_ever() -> None:
    """The function that the stacks must show."""
    while True:
        time.sleep(1)


def sleep_with_the_lock() -> None:
    """Keeps the interpreter's lock, so that no other thread of Python runs."""
    ctypes.PyDLL(None).sleep(1000)


def die() -> None:
    """SIGKILL, as often as the file beside the configuration has letters; takes one of them."""
    left = Path(sys.argv[2]).with_suffix(".deaths")
    if left.exists() and left.read_text():
        left.write_text(left.read_text()[1:])
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    fault = {"hang": sleep_for_ever, "lock": sleep_with_the_lock, "die": die}[sys.argv[1]]
    step = TrainingStep.__call__

    def faulty_step(self: TrainingStep, number: int, inputs: list) -> Any:
        last_rank = int(os.environ.get("WORLD_SIZE", "1")) - 1
        if number == STEP and int(os.environ.get("RANK", "0")) == last_rank:
            fault()
        return step(self, number, inputs)

    TrainingStep.__call__ = faulty_step
    sys.exit(main(["pretrain", sys.argv[2]]))
