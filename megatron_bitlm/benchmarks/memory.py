"""Peak memory of one variant, measured in a process that holds nothing else.

In a shared process the variants' weights, caches and freed memory could not be told apart.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.parallel.processes import end_with_parent

_NUM_CALLS = 2  # optimizer states appear in the first step, so only the second one sees everything
_STATUS = Path("/proc/self/status")

Builder = Callable[[Any, str], Callable[[], object]]


def peak_memory(build: Builder, settings: Any, name: str, device: torch.device) -> int | None:
    """Bytes that building a variant and calling it twice adds at its peak.

    On a GPU: the most that PyTorch's allocator held at once. On a CPU: the most resident memory of the process, less
    what it held before building; freed memory that the C library keeps counts, as it does in a run.

    Args:
        build: A function of a module, `build(settings, name)`, that returns the call; it runs in the new process.
        settings: Passed on; must pickle.
        name: The variant.
        device: Where it runs.

    Returns:
        Bytes, or None on a CPU outside Linux, where the system does not tell.

    Raises:
        BitLMError: The process died, most likely for lack of memory.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        try:
            return pool.submit(_measure, build, settings, name, device).result()
        except BrokenProcessPool as error:
            raise BitLMError(
                f"the process that measured the memory of {name} died, perhaps for lack of it; choose smaller sizes"
            ) from error


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM now, None outside Linux."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int | None:
    """The most memory of this process that ever was in RAM, None outside Linux."""
    return _status_bytes("VmHWM")


def _measure(build: Builder, settings: Any, name: str, device: torch.device) -> int | None:
    before = resident_bytes()
    if device.type == "cuda":
        torch.cuda.init()  # before it there are no statistics to reset
        torch.cuda.reset_peak_memory_stats(device)
    run = build(settings, name)
    for _ in range(_NUM_CALLS):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    after = peak_resident_bytes()
    return None if before is None or after is None else after - before


def _status_bytes(key: str) -> int | None:
    # Not getrusage: its maximum is inherited from the process that started this one.
    if sys.platform != "linux":
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
