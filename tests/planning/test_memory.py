"""Counted memory against real storages: buffers, optimizer state, what autograd keeps, and the backward pass's peak."""

from dataclasses import replace

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_bitlm.model.build import unwrap
from megatron_bitlm.planning.activations import activation_bytes
from megatron_bitlm.planning.memory import RankMemory, in_flight, memory_by_rank, state_bytes
from megatron_bitlm.planning.parameters import parameter_sizes
from megatron_bitlm.training.optimizer import build_optimizer
from tests.planning.models import (
    VOCAB_SIZE,
    as_softmax,
    build,
    kept_bytes,
    loss_function,
    small_run,
    started,
    with_head,
)

RUNS = {
    "fp32": small_run(),
    "one row": small_run(micro_batch_size=1),
    "bf16": small_run(precision="bf16"),
    "copies": small_run(copies=3),
    "full": small_run(recompute="full"),
    "full, three layers a chunk": small_run(recompute="full", recompute_num_layers=3),
    "block": small_run(recompute="full", recompute_method="block", recompute_num_layers=2),
    "mlp": small_run(recompute="selective", recompute_modules=("mlp",)),
    "core attention": small_run(recompute="selective"),
    "norms and mlp": small_run(recompute="selective", recompute_modules=("layernorm", "mlp")),
    "head": with_head(small_run(), activation_checkpointing=True),
    "mix": with_head(small_run(), conditioning="mix", slot_embedding=True),
    "embedding": replace(small_run(), model=replace(small_run().model, input="embedding")),
    "softmax": as_softmax(small_run()),
    "softmax, bf16, tied": as_softmax(small_run(precision="bf16"), tie_embeddings=True),
    "bce": replace(small_run(), objective=replace(small_run().objective, loss="bce")),
}


def planned(config) -> RankMemory:
    sizes = parameter_sizes(config.model, VOCAB_SIZE)
    (memory,) = memory_by_rank(config, sizes, activation_bytes(config, VOCAB_SIZE, fused=False), 1)
    return memory


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made under it that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def total(self) -> int:
        self.storages = {key: item for key, item in self.storages.items() if not item[0].expired()}
        return sum(size for _, size in self.storages.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, torch.nn.Parameter):
                storage = tensor.untyped_storage()
                self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.total())
        return out


def peak_bytes(config) -> int:
    """Most bytes alive at once in a forward and backward pass, parameters and their gradients apart."""
    with started(config) as state:
        model = build(config, state)
        loss = loss_function(config, model)
        owned = 0
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with LiveBytes() as live:
            for parameter in model.parameters():  # seen as views by the mode: not to be counted
                for tensor in (parameter.view(-1), parameter.grad.view(-1)):
                    owned += tensor.untyped_storage().nbytes()
            live.peak = 0
            loss().backward()
        return live.peak - owned


@pytest.mark.parametrize("config", RUNS.values(), ids=RUNS.keys())
def test_kept_activations_are_those_of_autograd(config):
    memory = planned(config)
    assert memory.activations + memory.head_activations == pytest.approx(kept_bytes(config), rel=0.01)


@pytest.mark.parametrize("name", ["fp32", "full", "mlp", "head", "copies", "softmax", "softmax, bf16, tied"])
def test_peak_of_a_step_is_within_a_tenth(name):
    config = RUNS[name]
    memory = planned(config)
    expected = memory.activations + memory.head_activations + memory.workspace
    assert expected == pytest.approx(peak_bytes(config), rel=0.1)


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "plain"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_states_are_those_of_the_real_objects(precision, distributed):
    config = small_run(precision=precision, use_distributed_optimizer=distributed)
    with started(config) as state:
        model = build(config, state)
        settings = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
        wrapped = DistributedDataParallel(unwrap(model).config, settings, model)
        optimizer = build_optimizer(
            config.optimizer,
            [wrapped],
            bf16=precision == "bf16",
            use_distributed_optimizer=distributed,
            overlap_param_gather=False,
        )
        loss = loss_function(config, wrapped)
        loss().backward()
        wrapped.finish_grad_sync()
        optimizer.step()
        weights = storage_bytes(wrapped.parameters())
        gradients = sum(buffer.grad_data.nbytes for buffer in wrapped.buffers)
        states = [
            value
            for part in getattr(optimizer, "chained_optimizers", [optimizer])
            for values in part.optimizer.state.values()
            for value in values.values()
            if torch.is_tensor(value) and value.ndim  # not the step counters
        ]
        masters = [
            parameter
            for part in getattr(optimizer, "chained_optimizers", [optimizer])
            for group in part.optimizer.param_groups
            for parameter in group["params"]
        ]
        found = storage_bytes(states) + (storage_bytes(masters) if precision == "bf16" else 0)
    memory = planned(config)
    assert memory.weights == weights
    assert memory.gradients == gradients
    assert memory.optimizer == found


def storage_bytes(tensors) -> int:
    """Bytes of the distinct storages of tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_optimizer_state_is_shared_by_the_data_parallel_ranks():
    config = small_run(precision="bf16")
    sizes = [[1000, 24, 5000]]
    alone, shared = state_bytes(config, sizes, 1), state_bytes(config, sizes, 8)
    assert alone[2] == 12 * 6024 and shared[2] == alone[2] / 8
    assert shared[:2] == (2 * 6144, 4 * 6144)  # 5000 -> 5056 + 24 -> 5120 + 1000 = 6120, in whole 128s


def test_micro_batches_in_flight():
    assert [in_flight(rank, 4, 1, 8) for rank in range(4)] == [[4], [3], [2], [1]]
    assert [in_flight(rank, 4, 1, 2) for rank in range(4)] == [[2], [2], [2], [1]]
    # Interleaved: the first rank runs ahead by 2 (P - 1) + (V - 1) P chunks and works on one more.
    assert in_flight(0, 2, 2, 8) == [3, 2]
    assert in_flight(1, 2, 2, 8) == [2, 1]
    assert sum(in_flight(0, 4, 3, 4)) == 12
