"""What each rank runs to compare layouts: one step's gradients under megatron-core's schedules."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_bitlm.model.backbone import Backbone, block_spec, transformer_config
from megatron_bitlm.model.initialization import global_names, initialize_parameters
from megatron_bitlm.model.inputs import CodeMLP
from megatron_bitlm.model.layout import SequenceLayout
from megatron_bitlm.model.presets import BackboneConfig
from megatron_bitlm.parallel.state import (
    ParallelConfig,
    ParallelState,
    initialize_parallel,
    shutdown_parallel,
)

SHAPE = BackboneConfig(4, 48, 80, 4, 2, head_dim=16)
NUM_BITS, ROWS, LENGTH, BLOCK_SIZE, NUM_MICROBATCHES = 9, 2, 32, 4, 4
OFFSETS = [0, 12, 28, 32, 48, 64]


@dataclass
class Shard:
    """A rank's part of a parameter: its value and its gradient."""

    name: str
    tensor_parallel_rank: int
    value: torch.Tensor
    gradient: torch.Tensor


def run_layouts(ports: list[int], layouts: list[ParallelConfig]) -> list[tuple[float | None, list[Shard]]]:
    """Loss (on the last stage) and this rank's parameters, for each layout."""
    results = []
    for port, layout in zip(ports, layouts, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        state = initialize_parallel(layout, seed=1)
        try:
            results.append(_one_step(state))
            dist.barrier()
        finally:
            shutdown_parallel()
    return results


def save_initial_weights(layout: ParallelConfig, path: str) -> None:
    """Writes the initial weights of a layout as a distributed checkpoint."""
    state = initialize_parallel(layout, seed=1)
    dist_checkpointing.save(_sharded(_initial_model(state)), path)
    shutdown_parallel()


def load_beside_initial_weights(path: str) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """In one process: each parameter's name, its value in the checkpoint and its initial value here."""
    state = initialize_parallel(ParallelConfig(), seed=1)
    model = _initial_model(state)
    loaded = dist_checkpointing.load(_sharded(_initial_model(state)), path)
    pairs = [(name, loaded[name], value.detach()) for name, value in model.named_parameters()]
    shutdown_parallel()
    return pairs


def _initial_model(state: ParallelState) -> Backbone:
    return _build(transformer_config(SHAPE, state.config, precision="fp64"), state, 0)


def _sharded(model: Backbone) -> dict:
    dp_cp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata={"dp_cp_group": dp_cp_group})


def _one_step(state: ParallelState) -> tuple[float | None, list[Shard]]:
    config = transformer_config(SHAPE, state.config, precision="fp64")
    config.finalize_model_grads_func = finalize_model_grads
    chunks = [_build(config, state, chunk) for chunk in range(state.num_chunks)]
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=False, check_for_nan_in_grad=False)
    model = [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]
    for chunk in model:
        chunk.zero_grad_buffer()
    outputs = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[_microbatches(state) for _ in model] if len(model) > 1 else _microbatches(state),
        model=model,
        num_microbatches=NUM_MICROBATCHES // state.data_parallel_size,
        seq_length=LENGTH,
        micro_batch_size=ROWS,
        forward_only=False,
    )
    loss = None
    if state.is_last_stage():
        total = torch.stack([output["loss"] for output in outputs]).sum()
        if state.config.sequence_parallel:
            dist.all_reduce(total, group=state.process_groups.tp)
        dist.all_reduce(total, group=state.process_groups.dp_cp)
        loss = total.item()
    return loss, [shard for chunk in chunks for shard in _shards(chunk, state)]


def _build(config, state: ParallelState, chunk: int) -> Backbone:
    stage = state.virtual_stage(chunk)
    first = state.is_first_stage(chunk)
    model = Backbone(
        config,
        block_spec(config, block_size=BLOCK_SIZE, vp_stage=stage),
        backbone=SHAPE,
        input_module=CodeMLP(NUM_BITS, 64, SHAPE.hidden_size, dtype=torch.float64) if first else None,
        pre_process=first,
        post_process=state.is_last_stage(chunk),
        vp_stage=stage,
        pg_collection=state.process_groups,
    )
    initialize_parameters(model, seed=3)
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            parameter.mul_(1.5 if "norm" in name else 6.0)
    return model.train()


def _microbatches(state: ParallelState) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Codes and loss weights; data-parallel ranks take turns."""
    generator = torch.Generator().manual_seed(17)
    for index in range(NUM_MICROBATCHES):
        codes = 2.0 * torch.randint(0, 2, (ROWS, LENGTH, NUM_BITS), generator=generator) - 1
        weights = torch.randn(LENGTH, ROWS, SHAPE.hidden_size, generator=generator, dtype=torch.float64)
        if index % state.data_parallel_size == state.data_parallel_rank:
            yield codes.double(), weights


def _forward_step(data: Iterator[tuple[torch.Tensor, torch.Tensor]], model: DistributedDataParallel):
    codes, weights = next(data)
    layout = SequenceLayout.from_batch(OFFSETS, ROWS, LENGTH, BLOCK_SIZE)
    shard = model.module.own_layout(layout).shard
    if shard is not None:
        codes, weights = shard.take(codes), shard.take(weights, 0)
    hidden = model(codes, layout)

    def loss_function(output: torch.Tensor):
        own = weights
        if output.shape[0] != weights.shape[0]:
            group = model.module.pg_collection.tp
            own = weights.chunk(group.size())[group.rank()]
        loss = (output * own).sum()
        # clone: megatron-core divides the sum in place
        return loss, torch.tensor(ROWS * weights.shape[0], dtype=torch.int32), {"loss": loss.detach().clone()}

    return hidden, loss_function


def _shards(chunk: Backbone, state: ParallelState) -> Iterator[Shard]:
    layers = global_names(chunk)
    for name, parameter in chunk.named_parameters():
        for local, whole in layers.items():
            if name.startswith(f"{local}."):
                name = whole + name.removeprefix(local)
                break
        yield Shard(name, state.tensor_parallel_rank, parameter.detach().clone(), parameter.main_grad.clone())
