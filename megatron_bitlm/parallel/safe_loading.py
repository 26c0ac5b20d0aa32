"""Reading megatron-core's checkpoints without running code that somebody put into them.

Two things in a `torch_dist` folder are pickles, and a pickle may name any function to call when it is read:

- `.metadata`, where each tensor lies: torch reads it with plain `pickle`. Here an unpickler reads it that knows only
  the few classes such a file consists of.
- `common.pt`, what is not sharded, and objects inside the `.distcp` files: here always `torch.load(weights_only=True)`,
  whatever the environment says.

What Transformer Engine would unpickle, its `_extra_state`, our checkpoints do not have, and it is never asked for.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.msc_utils import MultiStorageClientFeature
from torch.distributed.checkpoint import CheckpointException, Metadata, ReadItem
from torch.distributed.checkpoint._nested_dict import set_element

from megatron_bitlm.errors import BitLMError

METADATA_FILE = ".metadata"
_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# What `.metadata` is made of: plain records of torch, and how torch pickles a layout and a size.
_KNOWN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    # megatron-core's own writer also leaves every rank's plan there.
    ("torch.distributed.checkpoint.planner", "SavePlan"),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    ("torch.distributed.checkpoint.planner", "WriteItem"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only what is known; everything else that a pickle could call passes through here."""
        if (module, name) in _KNOWN or (module == "torch" and name in _DTYPES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}, which no such file needs")


def read_tensor_metadata(path: str | os.PathLike) -> Metadata:
    """`.metadata` of a checkpoint folder: shapes, dtypes and places of its tensors. Runs nothing.

    Raises:
        BitLMError: Unreadable, no such file, or a pickle of something else.
    """
    file = Path(path) / METADATA_FILE
    try:
        with open(file, "rb") as stream:
            found = _MetadataUnpickler(stream).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"holds a {type(found).__name__}")
        _check_places(found)
    # A pickle that is damaged, or made to deceive, fails in as many ways as there are opcodes.
    except Exception as error:
        raise BitLMError(
            f"{file} is not the description of a checkpoint ({error}) and nothing of it was run; do not use "
            "this checkpoint, or get it again from where you trust it"
        ) from error
    return found


def read_common_state(path: str | os.PathLike) -> dict[str, Any]:
    """`common.pt` of a checkpoint folder: what is not sharded, in plain Python types and tensors. Runs nothing.

    Raises:
        BitLMError: Unreadable, or a pickle of something else.
    """
    file = Path(path) / COMMON_STATE_FNAME
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise BitLMError(
            f"{file} holds more than plain data or is damaged ({reason}) and nothing of it was run; do not use this "
            "checkpoint, or get it again from where you trust it"
        ) from error


def load_sharded(state: dict[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    """The tensors that `state` asks for, from a checkpoint written in any layout. Collective. Runs nothing found there.

    Raises:
        BitLMError: The folder's pickles hold something else than tensors and plain data.
    """
    install_safe_loading()
    read_tensor_metadata(path)  # here its error is one sentence; inside of torch it would be a report by rank
    try:
        return dist_checkpointing.load(state, str(path), common_strategy=_SafeCommonLoad())
    except CheckpointException as error:
        refused = [failure for failure, _ in error.failures.values() if isinstance(failure, pickle.UnpicklingError)]
        if not refused:
            raise
        raise BitLMError(
            f"{path} holds an object among its tensors that is more than plain data and nothing of it was run; do not "
            "use this checkpoint, or get it again from where you trust it"
        ) from error


def install_safe_loading() -> None:
    """Makes megatron-core itself, whoever calls it in this process, read checkpoints by the functions above."""
    torch_strategies._get_filesystem_reader = _SafeReader
    torch_strategies.MCoreLoadPlanner = _SafePlanner
    TorchCommonLoadStrategy.load_common = _SafeCommonLoad.load_common
    MultiStorageClientFeature.disable()  # a reader of its own, which unpickles; our folders are plain ones


class _SafeReader(CachedMetadataFileSystemReader):
    """Reads `.metadata` with the unpickler above."""

    def __init__(self, path: str | os.PathLike, cache_metadata: bool = True) -> None:
        super().__init__(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._cached_metadata is None:
            self._cached_metadata = read_tensor_metadata(self.path)
            self._cached_metadata.storage_meta.load_id = self.load_id
        return self._cached_metadata


class _SafePlanner(torch_strategies.MCoreLoadPlanner):
    """Loads objects, where torch's planner would unpickle them, as plain data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        loaded = torch.load(value, weights_only=True)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)
        else:
            self.state_dict[read_item.dest_index.fqn] = loaded


class _SafeCommonLoad(TorchCommonLoadStrategy):
    def load_common(self, checkpoint_dir: str | os.PathLike) -> dict[str, Any]:
        return read_common_state(checkpoint_dir)


def _check_places(metadata: Metadata) -> None:
    """Every tensor lies in a file of the folder itself."""
    if metadata.storage_meta is None or not isinstance(metadata.storage_data, dict):
        raise pickle.UnpicklingError("does not say where the tensors are")
    for place in metadata.storage_data.values():
        if Path(place.relative_path).name != place.relative_path:
            raise pickle.UnpicklingError(f"points to {place.relative_path}, outside of the folder")
