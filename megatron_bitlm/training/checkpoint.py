"""Writing checkpoints: aside, synced, renamed; see model/checkpoint.py for what they hold.

A save begins on all ranks at one step and is completed, also by all, when every rank's share is on disk: at once, or
steps later where the shares are written in the background. Until its folder is renamed nothing takes it for a
checkpoint.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

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
from megatron_bitlm.parallel.safe_loading import load_sharded
from megatron_bitlm.training.checkpoint_writing import Share, TensorWriter, file_record, told_by_rank_0

_LEFTOVERS = (".step_*.tmp", ".step_*.old")  # of saves and removals that a kill interrupted


@dataclass
class CheckpointConfig:
    """When checkpoints are written and which are kept.

    Attributes:
        interval_steps: Steps between checkpoints; 0 writes only the last.
        keep_last: How many of the newest to keep.
        keep_every_steps: Also keep for good those of every so many steps; 0 keeps none.
        asynchronous: Training goes on while a forked process writes the snapshot; off, it waits for the disk.
        failed_saves_allowed: Failed saves in a row that are only warned of, each followed by another try when the next
            is due; one more ends the run, as does a failed last one.
    """

    interval_steps: int = 1000
    keep_last: int = 3
    keep_every_steps: int = 0
    asynchronous: bool = True
    failed_saves_allowed: int = 2

    def validate(self) -> None:
        """Raise BitLMError naming the setting and its value."""
        for name in ("interval_steps", "keep_every_steps", "failed_saves_allowed"):
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


@dataclass
class _PendingSave:
    """A save that has begun: its final folder, where it is written, and what belongs beside the tensors."""

    final: Path
    aside: Path
    writer: TensorWriter
    meta: dict[str, Any]
    tokenizer: Tokenizer
    code: BinaryCode


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
        self._queue = AsyncCallsQueue(persistent=False)
        self._failures: list[str] = []  # of the last saves, up to the newest that succeeded
        self._naming: tuple[_PendingSave, Future | None] | None = None  # the future is rank 0's

    def save(self, step: int, meta: dict[str, Any], tokenizer: Tokenizer, code: BinaryCode) -> None:
        """Begin the checkpoint of `step`, and complete it unless that is left to `poll` and `finish`. Collective.

        Waits for the one before it. Tokenizer and code map go along, so that a checkpoint alone can generate. A
        complete checkpoint of the same step is left as it is.

        Args:
            step: The last step that is in the weights.
            meta: JSON data stored beside the tensors.
            tokenizer, code: Of the data.

        Raises:
            BitLMError: It cannot be written, and so could not those before it (`failed_saves_allowed`).
        """
        self._complete_pending(blocking=True)
        self._raise_after_too_many()
        final = self.folder / step_folder(step)
        aside = self.folder / f".{final.name}.tmp"
        exists, error = told_by_rank_0(self._prepare(final, aside) if dist.get_rank() == 0 else None)
        if exists:
            return
        if error is None:
            in_background = self.config.asynchronous
            writer = TensorWriter(aside, in_background=in_background)
            with _collecting_only_new_garbage():
                request, error = writer.plan(self._state(is_loading=False))
        if error is not None:
            self._note_end(final, aside, error)
        else:
            pending = _PendingSave(final, aside, writer, {"step": step, **meta}, tokenizer, code)
            request.add_finalize_fn(lambda: self._begin_naming(pending))
            if in_background:
                self._queue.schedule_async_request(request)
            else:
                request.execute_sync()
                self._complete_pending(blocking=True)
        self._raise_after_too_many()

    def poll(self) -> None:
        """Complete a save whose writing is done on every rank; call once a step. Collective.

        Raises:
            BitLMError: As `save`.
        """
        self._complete_pending(blocking=False)
        self._raise_after_too_many()

    def finish(self) -> None:
        """Wait for a save that is being written, and complete it. Collective.

        Raises:
            BitLMError: The newest save failed.
        """
        self._complete_pending(blocking=True)
        if self._failures:
            raise BitLMError(self._failures[-1])

    def finish_after_error(self, patience_s: float = 30.0) -> None:
        """As `finish`, on the way out of a run that failed: only if all ranks come here, and without errors of its own.

        An error of one rank alone must not wait for others that are in the middle of a step. What is then left of the
        save is nothing that looks complete.
        """
        if not self._queue.get_num_unfinalized_calls() and self._naming is None:
            return
        store, size = dist.distributed_c10d._get_default_store(), dist.get_world_size()
        names = [f"finish_after_error/{self.folder}/{self._queue.call_idx}/{rank}" for rank in range(size)]
        try:
            store.set(names[dist.get_rank()], "here")
            store.wait(names, timedelta(seconds=patience_s))
        except (RuntimeError, ValueError):  # torch's DistStoreError and timeouts
            return
        self._complete_pending(blocking=True)

    def _complete_pending(self, *, blocking: bool) -> None:
        """Go on with the save that is on its way: all shares written, then named by rank 0. Collective."""
        if self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=blocking)
        if self._naming is None:
            return
        pending, future = self._naming
        answer = None
        if future is not None and (blocking or future.done()):
            answer = (future.result(),)
        answer = told_by_rank_0(answer)
        if answer is not None:
            self._naming = None
            self._note_end(pending.final, pending.aside, answer[0])

    def _prepare(self, final: Path, aside: Path) -> tuple[bool, str | None]:
        """Whether the checkpoint is there already, or what keeps its folder from being made."""
        if (final / META_FILE).exists():
            return True, None
        try:
            if aside.exists():
                shutil.rmtree(aside)  # an interrupted save of ours
            aside.mkdir(parents=True)
        except OSError as error:
            return False, str(error)
        return False, None

    def _begin_naming(self, pending: _PendingSave) -> None:
        """When every rank has written its share. Collective.

        Rank 0 does the rest in a thread: it waits for the disk many times, and need not let training wait, too.
        """
        shares = pending.writer.gather()
        future = None
        if shares is not None:
            pool = ThreadPoolExecutor(1)
            future = pool.submit(self._commit, pending, shares)
            pool.shutdown(wait=False)
        self._naming = (pending, future)

    def _note_end(self, final: Path, aside: Path, error: str | None) -> None:
        """Remember on every rank whether the save succeeded; a failed one leaves no folder."""
        if error is None:
            self._failures.clear()
            return
        reason = " ".join(error.split())[:300]
        failure = (
            f"checkpoint {final} was not written ({reason}); those before it are kept, make room and resume the run"
        )
        self._failures.append(failure)
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            print(f"warning: {failure}", file=sys.stderr, flush=True)

    def _raise_after_too_many(self) -> None:
        if len(self._failures) > self.config.failed_saves_allowed:
            raise BitLMError(self._failures[-1])

    def load_latest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """Restore the newest undamaged checkpoint and return its meta data, or None without any. Collective.

        A damaged one is renamed to step_N.damaged, which nothing reads, and `warn` is told on every rank. What killed
        processes left half-written or half-removed is removed.

        Raises:
            BitLMError: There are checkpoints, and all are damaged.
        """
        self._complete_pending(blocking=True)
        if dist.get_rank() == 0:
            for path in (path for pattern in _LEFTOVERS for path in self.folder.glob(pattern)):
                shutil.rmtree(path)
        found = complete_checkpoints(self.folder)
        for _, path in reversed(found):
            damage = agreed_damage(path)
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
        loaded = load_sharded(self._state(is_loading=True), path)
        for name, chunk in zip(model_state(self.chunks), self.chunks, strict=True):
            chunk.load_state_dict(loaded[name], strict=True)
        self.optimizer.load_state_dict(loaded["optimizer"])
        self.scheduler.num_steps = 0  # megatron-core counts on from where the schedule is
        self.scheduler.load_state_dict(loaded["scheduler"])
        return meta

    def _state(self, *, is_loading: bool) -> dict[str, Any]:
        state = model_state(self.chunks)
        state["optimizer"] = self.optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=sharding_metadata()
        )
        state["scheduler"] = self.scheduler.state_dict()
        if not is_loading:
            state["content_metadata"] = _content_metadata()
        return state

    def _commit(self, pending: _PendingSave, shares: list[Share]) -> str | None:
        """What is beside the tensors, then the name, on rank 0 alone; what went wrong, for all ranks to be told."""
        try:
            self._write_beside(pending, pending.writer.complete(shares))
        except Exception as error:
            return str(error) or type(error).__name__
        return None

    def _write_beside(self, pending: _PendingSave, files: dict[str, Any]) -> None:
        aside, final = pending.aside, pending.final
        seal_checkpoint(aside, pending.meta, pending.tokenizer, pending.code, files)
        if final.exists():  # without meta.json: what is left of a checkpoint that something else damaged
            shutil.rmtree(final)
        os.replace(aside, final)
        _sync_folder(self.folder)
        write_atomic(self.folder / "latest", f"{final.name}\n".encode())
        self._remove_old()

    def _remove_old(self) -> None:
        every = self.config.keep_every_steps
        for step, old in complete_checkpoints(self.folder)[: -self.config.keep_last]:
            if every and step % every == 0:
                continue
            doomed = old.with_name(f".{old.name}.old")
            os.replace(old, doomed)  # first out of sight: an interrupted removal must not look complete
            shutil.rmtree(doomed, ignore_errors=True)


def seal_checkpoint(
    folder: Path,
    meta: dict[str, Any],
    tokenizer: Tokenizer,
    code: BinaryCode,
    files: dict[str, Any] | None = None,
) -> None:
    """Complete a folder that holds a checkpoint's tensors: tokenizer, code map, and last meta.json with checksums.

    Args:
        folder: Step folder, or what will be renamed to it.
        meta: Step, data identity, settings.
        tokenizer, code: Of the data.
        files: Records (`file_record`) of files whose checksums are known.
    """
    tokenizer.save(folder / TOKENIZER_FOLDER)
    if code.code_map is not None:
        np.save(folder / CODE_MAP_FILE, code.code_map)
    files = dict(files or {})
    others = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files |= {name: file_record(path) for name, path in others.items() if name not in files}
    record = {"format": FORMAT, "version": VERSION, **meta, "files": files}
    write_atomic(folder / META_FILE, (json.dumps(record, indent=1) + "\n").encode())
    _sync_folder(folder)


@contextmanager
def _collecting_only_new_garbage() -> Iterator[None]:
    """megatron-core collects garbage twice in every save; looking at every object of the run takes a quarter second."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _content_metadata() -> dict[str, Any]:
    return {key: value for key, value in sharding_metadata().items() if key != "dp_cp_group"}


def agreed_damage(path: Path) -> str | None:
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
