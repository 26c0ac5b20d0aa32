"""Lets megatron-core run on CPU + gloo, where CUDA is absent.

megatron-core spells ``cuda`` in its sources: ``device="cuda"``, ``torch.cuda.current_device()``, CUDA
generator states, parameters sorted by ``tensor.type() == "torch.cuda.FloatTensor"``. Instead of changing
torch for the whole process (a global ``TorchFunctionMode`` adds about a microsecond to every torch call and
stops ``torch.compile``), the modules of megatron-core on our path see a look-alike of the ``torch`` namespace
in which CUDA is the CPU. Nothing outside of those modules can tell the difference.
"""

import contextlib
import functools
import importlib
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_bitlm.errors import BitLMError

_CPU = torch.device("cpu")

# Every module of megatron-core 0.16 that names CUDA and that building, training or checkpointing our model
# runs.
_CUDA_SPEAKING_MODULES = (
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.mapping",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.state_dict_saver",
    "distributed.distributed_data_parallel",
    "distributed.param_and_grad_buffer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.optimizer",
    "parallel_state",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "rerun_state_machine",
    "tensor_parallel.data",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "tensor_parallel.random",
    "tensor_parallel.utils",
    "timers",
    "transformer.module",
    "transformer.transformer_layer",
    "utils",
)

_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)


def _names_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``torch.zeros`` and its kin, with ``device="cuda"`` read as the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


def _look_alike(module: types.ModuleType, replaced: dict[str, Any]) -> types.ModuleType:
    """A module with the same attributes (late ones too) but for those in ``replaced``."""
    copy = types.ModuleType(module.__name__, module.__doc__)
    # A full copy rather than only __getattr__: an attribute is then found as quickly as in the real module.
    copy.__dict__.update(vars(module))
    copy.__dict__.update(replaced)
    copy.__dict__["__getattr__"] = functools.partial(getattr, module)
    return copy


def _torch_without_cuda() -> types.ModuleType:
    def nothing(*_args: Any, **_kwargs: Any) -> None:
        """In place of waiting for a device or choosing one: there is one device and it is synchronous."""

    cuda = _look_alike(
        torch.cuda,
        {
            "current_device": lambda: _CPU,
            "device_count": lambda: 1,
            "set_device": nothing,
            "synchronize": nothing,
            # The tracker of CUDA generator states then forks the CPU generator (recompute, sequence
            # parallel).
            "get_rng_state": lambda *_args, **_kwargs: torch.get_rng_state(),
            "manual_seed": lambda seed: nothing(torch.manual_seed(seed)),
        },
    )
    return _look_alike(torch, {"cuda": cuda, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}})


@contextlib.contextmanager
def _tensors_pass_for_cuda() -> Iterator[None]:
    """Inside, ``Tensor.type()`` spells ``torch.cuda.*`` and ``Tensor.cuda()`` is the tensor itself.

    These two are methods of the tensor, which no namespace can stand in for; so they change for the few
    megatron functions that call them, and only while those run.
    """
    original_type = torch.Tensor.type

    def cuda_type(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original_type(tensor, dtype, *args, **kwargs)
        name = original_type(tensor)
        return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.")

    replaced = {"type": cuda_type, "cuda": lambda tensor, *_args, **_kwargs: tensor}
    previous = {name: torch.Tensor.__dict__.get(name) for name in replaced}
    for name, method in replaced.items():
        setattr(torch.Tensor, name, method)
    try:
        yield
    finally:
        for name, method in previous.items():
            if method is None:
                delattr(torch.Tensor, name)  # back to the inherited method
            else:
                setattr(torch.Tensor, name, method)


def _passing_for_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _tensors_pass_for_cuda():
            return function(*args, **kwargs)

    return call


def _let_tensors_pass_for_cuda() -> None:
    from megatron.core.dist_checkpointing import exchange_utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    users = (
        # They sort the parameters into 16-bit and fp32 by the name of the tensor type.
        (distrib_optimizer.DistributedOptimizer, "__init__"),
        (optimizer.Float16OptimizerWithFloat16Params, "__init__"),
        # It asserts that every gradient is a torch.cuda.FloatTensor. optimizer.py imported it by name.
        (clip_grads, "clip_grad_by_total_norm_fp32"),
        (optimizer, "clip_grad_by_total_norm_fp32"),
        # They move shards with .cuda() before they exchange them.
        (distrib_optimizer.DistributedOptimizer, "get_parameter_state_dp_zero"),
        (exchange_utils, "exchange_loaded_tensors_gather_rounds"),
        (exchange_utils, "exchange_loaded_tensors_broadcast"),
    )
    for owner, name in users:
        setattr(owner, name, _passing_for_cuda(getattr(owner, name)))


def _let_generator_states_be_cpu() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    # With one generator for both devices, using it inside a fork is no mistake.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )


@functools.cache  # idempotent: the second call finds the work done
def install_cpu_support() -> None:
    """Makes megatron-core usable on this machine's CPU. Call before a model or an optimizer is built.

    Raises:
        BitLMError: where CUDA is available; training would silently run on the CPU.
    """
    if torch.cuda.is_available():
        raise BitLMError(
            "CPU support for megatron-core must not be installed where CUDA is available; hide the GPUs with "
            "CUDA_VISIBLE_DEVICES='' to run on the CPU"
        )
    namespace = _torch_without_cuda()
    for name in _CUDA_SPEAKING_MODULES:
        module = importlib.import_module(f"megatron.core.{name}")
        module.torch = namespace  # type: ignore[attr-defined]
    _let_tensors_pass_for_cuda()
    _let_generator_states_be_cpu()
