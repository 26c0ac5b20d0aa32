"""Faults that tests put into training, and runs with them on one or several ranks."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from megatron_bitlm.errors import DivergedError
from megatron_bitlm.method.objective import DenoisingObjective
from megatron_bitlm.training import step as step_module
from megatron_bitlm.training.config import RunConfig
from megatron_bitlm.training.session import Session
from megatron_bitlm.training.step import TrainingStep
from megatron_bitlm.training.trainer import pretrain


@dataclass
class Faults:
    """What goes wrong.

    poisoned_samples: their loss is NaN; steep_samples: their loss is 100 times what it should be; poisoned_gradients:
    step -> (rank, end of a local parameter name) whose gradient is infinite on that rank; lost_updates: steps that are
    computed but update nothing (the reference).
    """

    poisoned_samples: tuple[int, ...] = ()
    steep_samples: tuple[int, ...] = ()
    poisoned_gradients: dict[int, tuple[int, str]] = field(default_factory=dict)
    lost_updates: tuple[int, ...] = ()


@contextlib.contextmanager
def injected(faults: Faults) -> Iterator[None]:
    """Runs in this process go wrong inside."""
    now = {"step": 0}
    score, step, build, update = (
        DenoisingObjective.__call__,
        TrainingStep.__call__,
        Session.__init__,
        step_module.update_weights,
    )

    def poisoned_score(self: Any, head: Any, condition: Any, clean: Any, sample: torch.Tensor, block: Any) -> Any:
        losses = score(self, head, condition, clean, sample, block)
        for numbers, factor in ((faults.poisoned_samples, torch.nan), (faults.steep_samples, 100.0)):
            bad = torch.isin(sample, torch.tensor(numbers, dtype=torch.int64))
            losses.objective = losses.objective * torch.where(bad, factor, 1.0)[:, None]
        return losses

    def counted_step(self: TrainingStep, number: int, inputs: list) -> Any:
        now["step"] = number
        return step(self, number, inputs)

    def hooked_build(self: Session, *args: Any) -> None:
        build(self, *args)
        for at, (rank, name) in faults.poisoned_gradients.items():
            for chunk in self.chunks:
                for parameter in (p for n, p in chunk.named_parameters() if n.endswith(name)):
                    if self.state.rank == rank:
                        parameter.register_hook(lambda g, at=at: g * (torch.inf if now["step"] == at else 1.0))

    def lossy_update(optimizer: Any, norm: float) -> None:
        if now["step"] not in faults.lost_updates:
            update(optimizer, norm)

    with (
        mock.patch.object(DenoisingObjective, "__call__", poisoned_score),
        mock.patch.object(TrainingStep, "__call__", counted_step),
        mock.patch.object(Session, "__init__", hooked_build),
        mock.patch.object(step_module, "update_weights", lossy_update),
    ):
        yield


def run_with_faults(ports: list[int], configs: list[RunConfig], faults: list[Faults]) -> list[str | None]:
    """Train every configuration on these ranks; the sentence that ended it early, if any."""
    torch.set_num_threads(1)
    ends: list[str | None] = []
    for port, config, fault in zip(ports, configs, faults, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with injected(fault):
            try:
                assert pretrain(config).finished
                ends.append(None)
            except DivergedError as error:
                ends.append(str(error))
    return ends
