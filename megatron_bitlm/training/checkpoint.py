"""Writing checkpoints: aside, synced, renamed; see model/checkpoint.py for what they hold."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_bitlm.data.files import sha256_file, write_atomic
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
        keep_every_steps: Also keep for good those of every so many steps; 0 keeps none.
    """

    interval_steps: int = 1000
    keep_last: int = 3
    keep_every_steps: int = 0

    def validate(self) -> None:
        """Raise BitLMError naming the setting and its value."""
        for name in ("interval_steps", "keep_every_steps"):
            if getattr(self, name) < 0:
                raise BitLMError(f"checkpoint.{name} must not be negative, got {getattr(self, name)}")
        if self.keep_last < 1:
            raise BitLMError(f"checkpoint.keep_last must be at least 1, got {self.keep_last}")


def describe_damage(path: Path, *, share: int = 0, num_shares: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, or None; reads every byte of this share of them.

    Args:
        path: Step folder.
        share, num_shares: Ranks divide the files among them.
    """
    try:
        meta = read_meta(path)
        for name in sorted(meta["files"])[share::num_shares]:
            if sha256_file(path / name) != meta["files"][name]["sha256"]:
                return f"checkpoint file {path / name} does not match its checksum"
    except (BitLMError, KeyError, TypeError, OSError) as error:
        return str(error)
    return None


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
        dist.barrier()
        files = _checksums(aside)
        if dist.get_rank() == 0:
            self._commit(aside, final, {"step": step, "files": files, **meta})
        dist.barrier()
        return final

    def load_latest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """Restore the newest undamaged checkpoint and return its meta data, or None without any. Collective.

        A damaged one is renamed to step_N.damaged, which nothing reads, and `warn` is told on every rank.

        Raises:
            BitLMError: There are checkpoints, and all are damaged.
        """
        found = complete_checkpoints(self.folder)
        for _, path in reversed(found):
            damage = _agreed_damage(path)
            if damage is None:
                return self._load(path)
            warn(f"{damage}: {path.name} is set aside, and the checkpoint before it is used")
            dist.barrier()
            if dist.get_rank() == 0:
                os.replace(path, _unused(path.with_name(f"{path.name}.damaged")))
            dist.barrier()
        if found:
            raise BitLMError(f"every checkpoint in {self.folder} is damaged; start again in another run.directory")
        return None

    def _load(self, path: Path) -> dict[str, Any]:
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

    def _commit(self, aside: Path, final: Path, meta: dict[str, Any]) -> None:
        record = {"format": FORMAT, "version": VERSION, **meta}
        write_atomic(aside / META_FILE, (json.dumps(record, indent=1) + "\n").encode())
        if final.exists():  # without meta.json: what is left of a checkpoint that something else damaged
            shutil.rmtree(final)
        os.replace(aside, final)
        _sync_folder(self.folder)
        write_atomic(self.folder / "latest", f"{final.name}\n".encode())
        every = self.config.keep_every_steps
        for step, old in complete_checkpoints(self.folder)[: -self.config.keep_last]:
            if every and step % every == 0:
                continue
            doomed = old.with_name(f".{old.name}.old")
            os.replace(old, doomed)  # first out of sight: an interrupted removal must not look complete
            shutil.rmtree(doomed)


def _content_metadata() -> dict[str, Any]:
    return {key: value for key, value in sharding_metadata().items() if key != "dp_cp_group"}


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file, synced to disk; each rank reads its share. Collective."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    own = {}
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
        own[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    shares: list[dict[str, dict[str, Any]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, own)
    return {name: known for share in shares for name, known in share.items()}


def _agreed_damage(path: Path) -> str | None:
    """`describe_damage`, the files shared among the ranks; the same answer on every rank. Collective."""
    own = describe_damage(path, share=dist.get_rank(), num_shares=dist.get_world_size())
    answers: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, own)
    return next((answer for answer in answers if answer is not None), None)


def _unused(path: Path) -> Path:
    """`path`, or with a number behind it where something has that name."""
    names = (path, *(path.with_name(f"{path.name}.{number}") for number in range(1, 1000)))
    return next(name for name in names if not name.exists())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
