"""Worker processes that neither outlive nor outnumber what they were started for."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import BaseContext


def pool_context() -> BaseContext:
    """How worker processes start: forked on Linux (quick, nothing to import again), spawned elsewhere."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def num_usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
