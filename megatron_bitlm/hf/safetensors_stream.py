"""Writing safetensors files one tensor at a time, so that a model larger than memory can be exported.

The format (huggingface/safetensors): a little-endian uint64, that many bytes of JSON header, then the tensors' bytes in
row-major order. The library's own writer wants all tensors of a file at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to come: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of the tensor in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_shards(plans: list[TensorPlan], max_shard_bytes: int) -> list[tuple[str, list[TensorPlan]]]:
    """(file name, its tensors) in order; a file holds more than `max_shard_bytes` only where one tensor does."""
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + plan.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.num_bytes
    if len(shards) == 1:
        return [("model.safetensors", shards[0])]
    return [(f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard) for i, shard in enumerate(shards, 1)]


def write_safetensors(path: Path, plans: list[TensorPlan], tensors: Iterable[Tensor]) -> None:
    """Write one file and sync it; `tensors` come in the order of `plans`, and are let go one by one.

    Raises:
        ValueError: A tensor that is not as planned.
    """
    iterator = iter(tensors)
    with open(path, "xb") as file:
        file.write(_header(plans))
        for plan in plans:
            tensor = next(iterator)
            if tuple(tensor.shape) != plan.shape or tensor.dtype != plan.dtype:
                raise ValueError(f"{plan.name} is {tensor.dtype} {tuple(tensor.shape)}, planned {plan}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_shards(folder: Path, shards: list[tuple[str, list[TensorPlan]]], tensors: Iterator[Tensor]) -> dict[str, str]:
    """Write all files, and the index where there are several; returns the file of every tensor."""
    places = {}
    for name, plans in shards:
        write_safetensors(folder / name, plans, tensors)
        places |= {plan.name: name for plan in plans}
    if len(shards) > 1:
        total = sum(plan.num_bytes for _, plans in shards for plan in plans)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return places


def _header(plans: list[TensorPlan]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        end = offset + plan.num_bytes
        entries[plan.name] = {"dtype": _NAMES[plan.dtype], "shape": list(plan.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
