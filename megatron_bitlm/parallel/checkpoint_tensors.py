"""Single tensors of a checkpoint, read and written without a model, process groups or the rest of the checkpoint.

A checkpoint stores every tensor in pieces, those that the ranks of its layout wrote; any box of it is put together from
the pieces that it meets, one at a time.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.parallel.safe_loading import METADATA_FILE, read_tensor_metadata


class CheckpointTensors:
    """Reads tensors by their names in a checkpoint folder; runs nothing that it finds there.

    Args:
        path: A step folder.

    Raises:
        BitLMError: No readable description of tensors there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata = read_tensor_metadata(path)
        self._tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._pieces: dict[str, list[tuple[MetadataIndex, Any]]] = defaultdict(list)
        for index, place in metadata.storage_data.items():
            self._pieces[index.fqn].append((index, place))

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor.

        Raises:
            BitLMError: No such tensor.
        """
        return tuple(self._entry(name).size)

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._entry(name).properties.dtype

    def read(self, name: str, first: int | None = None) -> Tensor:
        """The whole tensor, or its part number `first` along the first dim (without that dim).

        Raises:
            BitLMError: No such tensor, or pieces that do not cover it.
        """
        shape = self.shape(name)
        start = [0] * len(shape)
        size = list(shape)
        if first is not None:
            start[0], size[0] = first, 1
        out = torch.empty(size, dtype=self.dtype(name))
        covered = 0
        chunks = {tuple(chunk.offsets): chunk for chunk in self._entry(name).chunks}
        for index, place in self._pieces[name]:
            chunk = chunks[tuple(index.offset)]
            inside = [
                (max(a, o), min(a + n, o + c))
                for a, n, o, c in zip(start, size, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(low >= high for low, high in inside):
                continue
            piece = self._load(place).reshape(tuple(chunk.sizes))
            source = tuple(slice(low - o, high - o) for (low, high), o in zip(inside, chunk.offsets, strict=True))
            target = tuple(slice(low - a, high - a) for (low, high), a in zip(inside, start, strict=True))
            out[target] = piece[source]
            covered += out[target].numel()
        if covered != out.numel():
            raise BitLMError(f"{self.path}: the pieces of {name} do not cover it; use another checkpoint")
        return out if first is None else out[0]

    def _load(self, place: Any) -> Tensor:
        with open(self.path / place.relative_path, "rb") as file:
            file.seek(place.offset)
            return torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)

    def _entry(self, name: str) -> TensorStorageMetadata:
        if name not in self._tensors:
            raise BitLMError(f"{self.path} holds no tensor {name}; it is a checkpoint of another model")
        return self._tensors[name]


class CheckpointTensorsWriter:
    """Writes tensors piece by piece into a folder that `CheckpointTensors` and megatron-core's loader read.

    The layout is torch's distributed checkpoint with megatron-core's two files beside it. Only the piece being written
    is in memory. `close` completes the folder; without it nothing there can be read.

    Args:
        path: Empty folder.
    """

    _FILE = "__0_0.distcp"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = open(path / self._FILE, "xb")  # noqa: SIM115 (held until close)
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def add(self, name: str, piece: Tensor, *, shape: Sequence[int] | None = None, first: int | None = None) -> None:
        """Write a tensor, or the part number `first` along the first dim of one of `shape`."""
        offset = torch.Size([0] * piece.ndim)
        if first is not None:
            piece, offset = piece[None], torch.Size([first] + [0] * piece.ndim)
        size = torch.Size(shape if shape is not None else piece.shape)
        begin = self._stream.tell()
        # A copy holds the piece alone; a view would bring all of its storage.
        torch.save(piece.contiguous().clone(), self._stream)
        index = MetadataIndex(name, offset)
        self._places[index] = _StorageInfo(self._FILE, begin, self._stream.tell() - begin)
        if name not in self._tensors:
            self._tensors[name] = TensorStorageMetadata(TensorProperties(dtype=piece.dtype), size, [])
        self._tensors[name].chunks.append(ChunkStorageMetadata(offset, piece.shape))

    def close(self, common: dict[str, Any]) -> None:
        """Sync what was added, and write the description and the state that is not sharded, `common`."""
        self._sync(self._stream)
        metadata = Metadata(self._tensors, storage_data=self._places, storage_meta=StorageMeta())
        with open(self.path / METADATA_FILE, "xb") as stream:
            pickle.dump(metadata, stream)
            self._sync(stream)
        with open(self.path / COMMON_STATE_FNAME, "xb") as stream:
            torch.save(common, stream)
            self._sync(stream)
        save_config(CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1), str(self.path))

    @staticmethod
    def _sync(stream: Any) -> None:
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()
