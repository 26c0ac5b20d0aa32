"""A request from outside to stop: SIGTERM or SIGUSR1, as a scheduler sends them before it takes a machine away.

The handlers only note the request. The loop asks once a step, and all ranks get the same answer at the same step, so
that they save one checkpoint together.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Handlers of SIGTERM and SIGUSR1 while a run lasts; a context manager.

    Once a stop was requested both signals are ignored when the context ends: the process is about to exit, and a
    repeated signal must not change its exit status. Python runs handlers in a process's main thread, so in another
    thread this installs none and never sees a request.

    Processes forked meanwhile, such as those that write a checkpoint, inherit the handlers and so outlive a signal that
    goes to every process of a job. Data loaders, whose handlers torch sets, leave stop signals to their parent, too.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            if self.requested is not None:
                handler = signal.SIG_IGN  # unlike a handler in Python, it lasts while the interpreter shuts down
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank. Collective."""
        return true_on_any_rank(self.requested is not None, device)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)


def true_on_any_rank(answer: bool, device: torch.device) -> bool:
    """Whether any rank says yes; the same answer on every rank. Collective."""
    if dist.get_world_size() == 1:
        return answer
    flag = torch.tensor([int(answer)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())
