"""A process that makes no progress writes the stacks of its threads and ends, so that whoever started it can go on.

Every rank watches itself: the one that hangs and those that wait for it run out of time together. Three timers are set
again at each phase, from what knows most to what works in the worst state:

- a thread that says what happened and ends the process with a status of its own,
- faulthandler's, in C: it writes the stacks even where one thread holds the interpreter's lock for good,
- the kernel's alarm, which kills a process whose interpreter cannot run the thread.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

from megatron_bitlm.errors import HANG_EXIT_STATUS, BitLMError

Phase = Literal["start", "step", "validation", "checkpoint", "end"]
_ALARM_DELAY_S = 5.0  # after the thread should have ended the process


@dataclass
class WatchdogConfig:
    """When a process that makes no progress is ended; 0 waits for ever.

    They should be less than `parallel.collective_timeout_minutes`, after which the waiting ranks give up without saying
    where they are.

    Attributes:
        step_timeout_s: Longest step, data loading included.
        start_timeout_s: Longest time from the joining of the processes to the end of the first step: model, index of
            the data, loading of a checkpoint, compilation.
        validation_timeout_s: Longest validation.
        checkpoint_timeout_s: Longest that training stands still for a checkpoint, and the longest end of a run.
        grace_s: Time between the writing of the stacks and the end, for other ranks to write theirs.
    """

    step_timeout_s: float = 900.0
    start_timeout_s: float = 1800.0
    validation_timeout_s: float = 1800.0
    checkpoint_timeout_s: float = 1800.0
    grace_s: float = 10.0

    def validate(self) -> None:
        """Raise BitLMError naming the setting and its value."""
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise BitLMError(f"watchdog.{name} must be finite and not negative, got {value}")

    def timeout_s(self, phase: Phase) -> float:
        """Of a phase; 0 is none."""
        return getattr(self, f"{'checkpoint' if phase == 'end' else phase}_timeout_s")


class Watchdog:
    """Ends this process when a phase lasts too long; a context manager, in which the phase is `start` at first.

    Args:
        config: Timeouts.
        stacks: File for the stacks; it is made at once, as making it may not work later, and removed if nothing came.
        rank: Of this process.
    """

    def __init__(self, config: WatchdogConfig, stacks: Path, rank: int) -> None:
        self.config, self.stacks, self.rank = config, stacks, rank
        self._changed = threading.Condition()
        self._current: tuple[Phase, float] | None = None  # and when it must be over, in time.monotonic()
        self._watching = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._file: BinaryIO | None = None

    def __enter__(self) -> Watchdog:
        self.stacks.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.stacks, "ab")  # noqa: SIM115 (the timer in C writes to it)
        self._watching = True
        self.phase("start")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._watching = False
            self._changed.notify()
        self._disarm()
        self._file.close()
        if not self.stacks.stat().st_size:
            self.stacks.unlink()
            with contextlib.suppress(OSError):  # unless there are other files
                self.stacks.parent.rmdir()
                self.stacks.parent.parent.rmdir()  # of a run that was refused

    def phase(self, name: Phase) -> None:
        """Start a phase; the one before is over."""
        timeout = self.config.timeout_s(name)
        self._disarm()
        with self._changed:
            self._current = (name, time.monotonic() + timeout) if timeout else None
            self._changed.notify()
        if timeout:
            faulthandler.dump_traceback_later(timeout, file=self._file)
            signal.setitimer(signal.ITIMER_REAL, timeout + self.config.grace_s + _ALARM_DELAY_S)

    def _disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _watch(self) -> None:
        with self._changed:
            while self._watching:
                left = None if self._current is None else self._current[1] - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            else:
                return
            name, _ = self._current
        self._end(name)

    def _end(self, name: Phase) -> None:
        """Say it, wait for the others, end without any cleaning up that could hang, too."""
        time.sleep(min(1.0, self.config.grace_s))  # the stacks are being written
        text = f"rank {self.rank} made no progress for {self.config.timeout_s(name):g} s in phase {name}"
        known = self.stacks.read_text(encoding="utf-8", errors="replace")
        print(f"{text}; stacks of its threads, in {self.stacks}, too:\n{known}", file=sys.stderr, flush=True)
        time.sleep(self.config.grace_s)
        os._exit(HANG_EXIT_STATUS)
