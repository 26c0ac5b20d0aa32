"""Real models and runs for the planner's numbers to be compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_bitlm.data.packing import DataConfig
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.head import HeadConfig
from megatron_bitlm.method.objective import DenoisingObjective, ObjectiveConfig
from megatron_bitlm.model.build import BackboneOverrides, ModelConfig, batch_layout, build_chunks, unwrap
from megatron_bitlm.model.softmax import SoftmaxConfig
from megatron_bitlm.parallel.config import ParallelConfig
from megatron_bitlm.parallel.state import ParallelState, initialize_parallel, shutdown_parallel
from megatron_bitlm.training.config import RunConfig, TrainingConfig

VOCAB_SIZE = 500
SEQUENCE_LENGTH = 128


def small_run(*, micro_batch_size: int = 2, precision: str = "fp32", copies: int = 1, **parallel) -> RunConfig:
    """A run small enough to measure; every width differs, so that none can stand in for another."""
    return RunConfig(
        model=ModelConfig(
            preset="tiny",
            backbone=BackboneOverrides(
                num_layers=3,
                hidden_size=96,
                ffn_hidden_size=256,
                num_attention_heads=4,
                num_query_groups=2,
                head_dim=32,
            ),
            head=HeadConfig(width=64, num_layers=4, head_dim=32),
            input_hidden_size=200,
        ),
        objective=ObjectiveConfig(samples_per_block=copies),
        data=DataConfig(sequence_length=SEQUENCE_LENGTH),
        training=TrainingConfig(
            global_batch_size=micro_batch_size, micro_batch_size=micro_batch_size, precision=precision
        ),
        parallel=ParallelConfig(**parallel),
    )


def with_head(config: RunConfig, **settings) -> RunConfig:
    """The run with other settings of its head."""
    return replace(config, model=replace(config.model, head=replace(config.model.head, **settings)))


def as_softmax(config: RunConfig, **tables) -> RunConfig:
    """The softmax baseline of the run."""
    return replace(config, model=replace(config.model, output="softmax", softmax=SoftmaxConfig(**tables)))


@contextmanager
def started(config: RunConfig) -> Iterator[ParallelState]:
    """This process alone, as the run's only rank."""
    state = initialize_parallel(config.parallel, seed=0)
    try:
        yield state
    finally:
        shutdown_parallel()


def build(config: RunConfig, state: ParallelState) -> torch.nn.Module:
    """The run's model, wrapped for its precision, in training mode."""
    (model,) = build_chunks(
        config.model,
        state,
        code=BinaryCode(VOCAB_SIZE),
        bos_id=1,
        eos_id=2,
        precision=config.training.precision,
        seed=0,
    )
    return model.train()


def loss_function(config: RunConfig, model: torch.nn.Module) -> Callable[[], Tensor]:
    """The loss of a random micro-batch; what it needs is made beforehand."""
    code, block_size = BinaryCode(VOCAB_SIZE), config.model.block_size
    rows, length = config.training.micro_batch_size, config.data.sequence_length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB_SIZE, (rows, length // block_size + 1, block_size), generator=generator)
    inputs = {
        "packed": code.pack(ids),
        "layout": batch_layout(config.model, None, batch_size=rows, sequence_length=length, device="cpu"),
        "sample_index": torch.arange(rows),
    }
    if config.model.output == "softmax":

        def cross_entropy() -> Tensor:
            scored = model(**inputs)
            return (scored.nats * scored.counted).sum()

        return cross_entropy
    inputs["objective"] = DenoisingObjective(config.objective, code, 0)
    return lambda: model(**inputs).scores.objective.sum()


def part_of(name: str) -> str:
    """The planner's word for where a parameter belongs."""
    if "input_module" in name:
        return "input"
    return "head" if ".head." in f".{name}" or ".output_layer." in f".{name}" else "backbone"


def counts_by_part(model: torch.nn.Module) -> dict[str, int]:
    """Parameters of a real model by part."""
    counts = {"backbone": 0, "input": 0, "head": 0}
    for name, parameter in unwrap(model).named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def kept_bytes(config) -> int:
    """Distinct storages that autograd keeps for the backward pass, parameters apart."""
    with started(config) as state:
        model = build(config, state)
        loss = loss_function(config, model)
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage._cdata] = storage
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            graph = loss()
        # Recomputed outputs have been emptied by now.
        found = sum(storage.nbytes() for storage in kept.values())
        graph.backward()
        return found
