"""Checkpoints: megatron-core's torch_dist format in a folder per step, complete or absent.

runs/NAME/checkpoints/
    step_00000500/    written aside as .step_00000500.tmp and renamed when every rank has finished
        meta.json     format version, step, configuration, code map and tokenizer hashes, file sizes
    latest            name of the newest complete folder
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from megatron_bitlm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.codes import BinaryCode

FORMAT, VERSION = "bitlm-checkpoint", 1
TOKENIZER_FOLDER, CODE_MAP_FILE = "tokenizer", "code_map.npy"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_SHARDING = "fully_reshardable"  # the optimizer layout that loads at any other parallel layout


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


def write_text_atomically(path: Path, text: str) -> None:
    """Write aside, fsync, rename: readers see the old file or the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    _sync_folder(path.parent)


def step_folder(step: int) -> str:
    """Folder name of a step, e.g. step_00000500."""
    return f"step_{step:08d}"


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every complete checkpoint under `folder`, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else []:
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and (path / "meta.json").is_file():
            found.append((int(match.group(1)), path))
    return sorted(found)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint meant by a step folder, a checkpoints folder or a run folder (the newest inside).

    Raises:
        BitLMError: Nothing complete is there.
    """
    path = Path(path)
    if (path / "meta.json").is_file():
        return path
    for folder in (path, path / "checkpoints"):
        found = complete_checkpoints(folder)
        if found:
            return found[-1][1]
    raise BitLMError(f"no complete checkpoint in {path}: give a run folder or one of its checkpoints/step_* folders")


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json of a checkpoint, after checking its version and the files' sizes.

    Raises:
        BitLMError: Unreadable, another format or version, or a file missing or truncated.
    """
    file = path / "meta.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BitLMError(f"cannot read {file}: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or meta.get("version") != VERSION:
        raise BitLMError(f"{file} is not a {FORMAT} of version {VERSION}; it was written by another release")
    for name, size in meta["files"].items():
        part = path / name
        actual = part.stat().st_size if part.is_file() else None
        if actual != size:
            state = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
            raise BitLMError(f"checkpoint file {part} {state}; use an earlier checkpoint")
    return meta


def load_code_and_tokenizer(path: Path, meta: dict[str, Any]) -> tuple[BinaryCode, Tokenizer]:
    """Code and tokenizer stored in a checkpoint.

    Raises:
        BitLMError: They are not the ones its meta.json names.
    """
    data = meta["data"]
    map_file = path / CODE_MAP_FILE
    code = BinaryCode(data["vocab_size"], np.load(map_file, allow_pickle=False) if map_file.is_file() else None)
    if code.code_map_hash != data["code_map_hash"]:
        raise BitLMError(f"the code map in {path} is not the one the checkpoint was trained with")
    tokenizer = load_tokenizer(path / TOKENIZER_FOLDER)
    if tokenizer.fingerprint != data["tokenizer_fingerprint"]:
        raise BitLMError(f"{path / TOKENIZER_FOLDER} is not the tokenizer the checkpoint was trained with")
    return code, tokenizer


def model_state(chunks: list) -> dict[str, Any]:
    """Sharded state of the unwrapped model chunks, one entry a chunk."""
    metadata = _metadata()
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(names, chunks, strict=True)}


def load_model(path: Path, chunks: list) -> None:
    """Load the model's tensors alone, whatever layout wrote them. Collective."""
    loaded = dist_checkpointing.load(model_state(chunks), str(path))
    for name, chunk in zip(model_state(chunks), chunks, strict=True):
        chunk.load_state_dict(loaded[name], strict=True)


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
        if final.exists():
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
        state["optimizer"] = self.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=_metadata())
        state["scheduler"] = self.scheduler.state_dict()
        return state

    def _commit(self, aside: Path, final: Path, step: int, meta: dict[str, Any]) -> None:
        files = {p.relative_to(aside).as_posix(): p.stat().st_size for p in sorted(aside.rglob("*")) if p.is_file()}
        for name in files:
            with open(aside / name, "rb") as file:
                os.fsync(file.fileno())
        record = {"format": FORMAT, "version": VERSION, "step": step, "files": files, **meta}
        write_text_atomically(aside / "meta.json", json.dumps(record, indent=1))
        os.replace(aside, final)
        _sync_folder(self.folder)
        write_text_atomically(self.folder / "latest", final.name + "\n")
        for _, old in complete_checkpoints(self.folder)[: -self.config.keep_last]:
            doomed = old.with_name(f".{old.name}.old")
            os.replace(old, doomed)  # first out of sight: an interrupted removal must not look complete
            shutil.rmtree(doomed)


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": _SHARDING,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "non_homogeneous_layers": False,
    }


def _content_metadata() -> dict[str, Any]:
    return {key: value for key, value in _metadata().items() if key != "dp_cp_group"}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
