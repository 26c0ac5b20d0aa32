"""Writing checkpoints: aside, synced, renamed; see model/checkpoint.py for what they hold."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_bitlm.data.files import write_atomic
from megatron_bitlm.data.tokenizer import Tokenizer
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.model.checkpoint import (
    CODE_MAP_FILE,
    FORMAT,
    META_FILE,
    TOKENIZER_FOLDER,
    VERSION,
    complete_checkpoints,
    model_state,
    read_meta,
    sharding_metadata,
    step_folder,
)


@dataclass
class CheckpointConfig:
    """When checkpoints are written and which are kept.

    Attributes:
        interval_steps: Steps between checkpoints; 0 writes only the last.
        keep_last: How many of the newest to keep.
    """

    interval_steps: int = 1000
    keep_last: int = 3

    def validate(self) -> None:
        """Raise BitLMError naming the setting and its value."""
        if self.interval_steps < 0:
            raise BitLMError(f"checkpoint.interval_steps must not be negative, got {self.interval_steps}")
        if self.keep_last < 1:
            raise BitLMError(f"checkpoint.keep_last must be at least 1, got {self.keep_last}")


class CheckpointManager:
    """Saves and restores a run's model, optimizer and schedule under `folder`.

    Args:
        folder: The run's checkpoints folder.
        config: When and how many.
        chunks: Unwrapped model chunks of this rank.
        optimizer, scheduler: megatron-core's.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, chunks: list, optimizer: Any, scheduler: Any) -> None:
        self.folder, self.config = folder, config
        self.chunks, self.optimizer, self.scheduler = chunks, optimizer, scheduler

    def save(self, step: int, meta: dict[str, Any], tokenizer: Tokenizer, code: BinaryCode) -> Path:
        """Write the checkpoint of `step`; `meta` is JSON data stored beside the tensors. Collective.

        Tokenizer and code map go along, so that a checkpoint alone can generate. A complete checkpoint of the same
        step is left as it is.
        """
        final = self.folder / step_folder(step)
        if (final / META_FILE).exists():
            return final
        aside = self.folder / f".{final.name}.tmp"
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)  # an interrupted save of ours
            aside.mkdir(parents=True)
        dist.barrier()
        state = self._state(is_loading=False)
        dist_checkpointing.save(state, str(aside), content_metadata=_content_metadata())
        dist.barrier()
        if dist.get_rank() == 0:
            tokenizer.save(aside / TOKENIZER_FOLDER)
            if code.code_map is not None:
                np.save(aside / CODE_MAP_FILE, code.code_map)
            self._commit(aside, final, step, meta)
        dist.barrier()
        return final

    def load_latest(self) -> dict[str, Any] | None:
        """Restore the newest complete checkpoint and return its meta data, or None without one. Collective."""
        found = complete_checkpoints(self.folder)
        if not found:
            return None
        path = found[-1][1]
        meta = read_meta(path)
        loaded = dist_checkpointing.load(self._state(is_loading=True), str(path))
        for name, chunk in zip(model_state(self.chunks), self.chunks, strict=True):
            chunk.load_state_dict(loaded[name], strict=True)
        self.optimizer.load_state_dict(loaded["optimizer"])
        self.scheduler.load_state_dict(loaded["scheduler"])
        return meta

    def _state(self, *, is_loading: bool) -> dict[str, Any]:
        state = model_state(self.chunks)
        state["optimizer"] = self.optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=sharding_metadata()
        )
        state["scheduler"] = self.scheduler.state_dict()
        return state

    def _commit(self, aside: Path, final: Path, step: int, meta: dict[str, Any]) -> None:
        files = {p.relative_to(aside).as_posix(): p.stat().st_size for p in sorted(aside.rglob("*")) if p.is_file()}
        for name in files:
            with open(aside / name, "rb") as file:
                os.fsync(file.fileno())
        record = {"format": FORMAT, "version": VERSION, "step": step, "files": files, **meta}
        write_atomic(aside / META_FILE, (json.dumps(record, indent=1) + "\n").encode())
        if final.exists():  # without meta.json: what is left of a checkpoint that something else damaged
            shutil.rmtree(final)
        os.replace(aside, final)
        _sync_folder(self.folder)
        write_atomic(self.folder / "latest", f"{final.name}\n".encode())
        for _, old in complete_checkpoints(self.folder)[: -self.config.keep_last]:
            doomed = old.with_name(f".{old.name}.old")
            os.replace(old, doomed)  # first out of sight: an interrupted removal must not look complete
            shutil.rmtree(doomed)


def _content_metadata() -> dict[str, Any]:
    return {key: value for key, value in sharding_metadata().items() if key != "dp_cp_group"}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
