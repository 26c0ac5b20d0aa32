"""What went wrong in a step whose loss or gradients are not finite: which parameters, samples and ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_bitlm.data.files import write_atomic
from megatron_bitlm.model.build import unwrap
from megatron_bitlm.model.initialization import global_names, globalize
from megatron_bitlm.training.signals import true_on_any_rank

FORMAT, VERSION = "megatron-bitlm-diagnosis", 1


@dataclass
class NonFiniteGradient:
    """A parameter with NaN or infinite gradients, the ranks that hold them, and how many elements over these."""

    name: str
    ranks: list[int]
    num_elements: int


@dataclass
class Diagnosis:
    """Of one step, the same on every rank.

    Attributes:
        step: Its number.
        loss: Of the step; may be finite where only gradients are not.
        gradient_norm: Global, before clipping.
        gradients: Parameters without finite gradients, in the order of the backward pass: the first one is where
            they come from, unless the loss is not finite itself. Empty where only the norm overflowed.
        samples: Numbers of the step's samples in the run.
        non_finite_samples: Those whose loss is not finite.
    """

    step: int
    loss: float
    gradient_norm: float
    gradients: list[NonFiniteGradient]
    samples: list[int]
    non_finite_samples: list[int]

    def sentence(self) -> str:
        """What happened, in one sentence without an end."""
        text = f"step {self.step}: loss {self.loss:.4g}, gradient norm {self.gradient_norm:.4g}"
        if self.gradients:
            first, others = self.gradients[0], len(self.gradients) - 1
            text += f"; the gradients of {first.name} on rank {_some(first.ranks)}"
            text += f" and of {others} parameters after it in the backward pass" if others else ""
            text += " are not finite"
        if self.non_finite_samples:
            text += f"; the loss is not finite for samples {_some(self.non_finite_samples)}"
        else:
            text += f"; the loss of each of samples {self.samples[0]}-{self.samples[-1]} is finite"
        return text

    def write(self, path: Path) -> None:
        """Write as JSON; numbers that JSON lacks become the strings nan, inf and -inf."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "loss": _json_number(self.loss),
            "gradient_norm": _json_number(self.gradient_norm),
            "samples": self.samples,
            "samples_with_non_finite_loss": self.non_finite_samples,
            "parameters_with_non_finite_gradients": [
                {"name": entry.name, "ranks": entry.ranks, "num_elements": entry.num_elements}
                for entry in self.gradients
            ],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def all_finite(values: Sequence[float], device: torch.device) -> bool:
    """Whether every rank's values are finite; the same answer on every rank. Collective."""
    return not true_on_any_rank(not all(math.isfinite(value) for value in values), device)


def diagnose(
    step: int,
    loss: float,
    gradient_norm: float,
    *,
    chunks: list,
    sample_index: list[Tensor],
    sample_losses: list[Tensor],
) -> Diagnosis:
    """Gather what every rank sees of a step whose gradients are still in their buffers. Collective.

    Args:
        step, loss, gradient_norm: Of the step.
        chunks: This rank's wrapped model chunks.
        sample_index: int64 [B], sample numbers of each micro-batch.
        sample_losses: [B] on the last pipeline stage, the same micro-batches; empty elsewhere.
    """
    samples = {number for numbers in sample_index for number in numbers.tolist()}
    non_finite = {
        number
        for numbers, losses in zip(sample_index, sample_losses, strict=False)  # other stages know no losses
        for number in numbers[~losses.isfinite()].tolist()
    }
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (_non_finite_gradients(chunks), samples, non_finite))
    return Diagnosis(
        step=step,
        loss=loss,
        gradient_norm=gradient_norm,
        gradients=_merged([gradients for gradients, _, _ in seen]),
        samples=sorted(set().union(*(numbers for _, numbers, _ in seen))),
        non_finite_samples=sorted(set().union(*(numbers for _, _, numbers in seen))),
    )


def _non_finite_gradients(chunks: list) -> dict[tuple[int, int, str], int]:
    """Non-finite elements by place in the forward pass (stage of the pipeline, place in it) and global name."""
    num_stages = parallel_state.get_pipeline_model_parallel_world_size()
    found = {}
    for number, chunk in enumerate(chunks):
        stage = number * num_stages + parallel_state.get_pipeline_model_parallel_rank()
        model = unwrap(chunk)
        layers = global_names(model)
        for place, (name, parameter) in enumerate(model.named_parameters()):
            count = int((~parameter.main_grad.isfinite()).sum())
            if count:
                found[stage, place, globalize(name, layers)] = count
    return found


def _merged(of_ranks: list[dict[tuple[int, int, str], int]]) -> list[NonFiniteGradient]:
    merged: dict[tuple[int, int, str], NonFiniteGradient] = {}
    for rank, found in enumerate(of_ranks):
        for key, count in found.items():
            entry = merged.setdefault(key, NonFiniteGradient(key[2], [], 0))
            entry.ranks.append(rank)
            entry.num_elements += count
    return [merged[key] for key in sorted(merged, reverse=True)]


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown}, ... ({len(numbers)} in all)" if len(numbers) > 8 else shown
