"""Imports megatron-core without loading torch's compiler, where that has nothing to compile.

megatron-core hands a few fused functions to torch.compile as it is imported, and each call loads the compiler: 40% of
the time it takes to start a process, for functions that only Transformer Engine's layers on a GPU use. A CPU build of
torch gets them as they are written. Importing this module is enough; it has to come before anything imports
megatron-core, and is without effect after.
"""

from collections.abc import Callable
from typing import Any

import torch


def _as_it_is(function: Callable | None = None, **_options: Any) -> Callable:
    """torch.compile, used with or without options."""
    return function if function is not None else _as_it_is


if not torch.backends.cuda.is_built():  # not cuda.is_available, which may touch the driver before a fork
    _compile = torch.compile
    torch.compile = _as_it_is
    try:
        import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401 (loads all that is compiled)
    finally:
        torch.compile = _compile
    del _compile
