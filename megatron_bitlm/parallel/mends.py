"""Mends for faults of megatron-core 0.16.1 that show without Transformer Engine and Apex, on any device."""

import functools
from typing import Any

import torch

from megatron_bitlm.parallel.processes import Outbox
from megatron_bitlm.parallel.safe_loading import install_safe_loading


def _mend_checkpoint_without_output() -> None:
    """Lets the norms be recomputed without Transformer Engine.

    ``CheckpointWithoutOutput(fp8=False)`` sets ``self.fp8 = fp8 is not None``, and then asks for TE's FP8
    context.
    """
    from megatron.core.tensor_parallel import random

    original = random.CheckpointWithoutOutput.__init__

    @functools.wraps(original)
    def init(self: Any, fp8: Any = False) -> None:
        original(self, fp8)
        self.fp8 = bool(fp8)

    random.CheckpointWithoutOutput.__init__ = init


def _fill_missing_adam_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives torch's Adam the state it will have before its first step: zero moments, zero steps."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state[param]:
                optimizer.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


def _mend_torch_adam() -> None:
    """Three faults of the distributed optimizer's state when its inner optimizer is torch's Adam."""
    from megatron.core.optimizer import distrib_optimizer

    # megatron-core itself handles 'step' right for the fused optimizers of TE and Apex.
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer_class = distrib_optimizer.DistributedOptimizer
    original_state_dict = optimizer_class.state_dict
    original_load_state_dict = optimizer_class.load_state_dict
    original_set_states = optimizer_class._set_main_param_and_optimizer_states

    @functools.wraps(original_state_dict)
    def state_dict(self: Any) -> dict[str, Any]:
        # It asserts that the parameters agree on one step, and before the first step there is none: neither a
        # checkpoint at step 0 nor a load into a fresh process (which starts from the state dict) would work.
        if not self.is_stub_optimizer and not self.optimizer.state:
            _fill_missing_adam_state(self.optimizer)
        return original_state_dict(self)

    @functools.wraps(original_load_state_dict)
    def load_state_dict(self: Any, loaded: dict[str, Any]) -> None:
        original_load_state_dict(self, loaded)
        # It hands ONE step tensor to all parameters, and each of them adds 1 to it at every step: the bias
        # correction of a resumed run would be wrong, with no error.
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    @functools.wraps(original_set_states)
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        # It copies every key of the optimizer's state from the checkpoint's tensors, which have no 'step'
        # (that is in the parameter groups, and already loaded).
        group_index, group_order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group_index]["params"][group_order]]
        if "step" in state and "step" not in tensors:
            tensors = {**tensors, "step": state["step"].clone()}
        original_set_states(self, model_param, tensors)

    optimizer_class.state_dict = state_dict
    optimizer_class.load_state_dict = load_state_dict
    optimizer_class._set_main_param_and_optimizer_states = set_states


def _mend_queue_server() -> None:
    """Lets the processes that write a checkpoint report to this one without a server between them.

    megatron-core spawns the server with the first checkpoint: some seconds, 275 MB, an entry script that must be safe
    to import, and nothing that ends it when the training process is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._get_write_results_queue = Outbox


@functools.cache  # idempotent: the second call finds the work done
def install_mends() -> None:
    """Applies the mends; call it before a model or an optimizer is built. TE's and Apex's paths stay."""
    _mend_checkpoint_without_output()
    _mend_torch_adam()
    _mend_queue_server()
    install_safe_loading()
