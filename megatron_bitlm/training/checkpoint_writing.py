"""Writing the tensors of a checkpoint through megatron-core, in this process or in one that goes on beside training.

megatron-core plans the save (who writes what) and gives back a request: a function that writes this rank's share of
tensors from main memory, to be called here or in a forked process. The fork is the snapshot: it gets the memory as it
is at that moment, copied page by page only where training changes it. Tensors on a GPU are first copied to pageable
main memory; pinned memory is the driver's mapping, of which a fork may see later contents. A process that megatron-core
keeps for all saves (`persistent=True`) would get CPU tensors in shared memory, and write what training made of them.
"""

from __future__ import annotations

import gc
import io
import os
import queue
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_bitlm.data.files import sha256_file
from megatron_bitlm.parallel.processes import Outbox, end_with_parent

_BACKEND, _BACKEND_VERSION = "torch_dist", 1
FileRecord = dict[str, Any]


@dataclass
class Share:
    """What one rank wrote: results for megatron-core, size and checksum of each file, or why it could not."""

    results: list = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)
    error: str | None = None


class TensorWriter(TorchDistSaveShardedStrategy):
    """Plans one save and, when every rank has written, completes the folder.

    Args:
        folder: Exists, is empty, and is given its final name by somebody else.
        in_background: The request will run in a forked process.
    """

    def __init__(self, folder: Path, *, in_background: bool) -> None:
        super().__init__(_BACKEND, _BACKEND_VERSION)
        self.folder, self.in_background = folder, in_background
        self._storage: FileSystemWriterAsync
        self._metadata: Any = None  # what lies where; known to rank 0
        self._outbox = Outbox()

    def plan(self, state: dict[str, Any]) -> tuple[AsyncRequest, str | None]:
        """The request that writes this rank's share, and what went wrong on rank 0 (the same answer on every rank).

        Collective. What is not sharded is written at once: it is small.
        """
        sharded, common = save_preprocess(state)
        error = None
        if dist.get_rank() == 0:
            content = io.BytesIO()  # writing to a full disk, torch would name a line of its own instead of the disk
            torch.save(common, content)
            try:
                (self.folder / COMMON_STATE_FNAME).write_bytes(content.getvalue())
            except OSError as caught:
                error = str(caught)
        error = told_by_rank_0(error)
        if error is not None:
            return AsyncRequest(None, (), []), error
        return self.async_save(sharded, self.folder), None

    def gather(self) -> list[Share] | None:
        """After the request ran on every rank: their shares, on rank 0, else None. Collective."""
        own = self._own_share()
        shares: list[Share] | None = [Share()] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own, shares)
        return shares

    def complete(self, shares: list[Share]) -> dict[str, FileRecord]:
        """On rank 0 alone: write the index; size and checksum of the files that hold tensors.

        Raises:
            OSError: A rank could not write its share, or this one cannot write the index.
        """
        error = next((share.error for share in shares if share.error is not None), None)
        if error is not None:
            raise OSError(error)
        vars(self._metadata).pop("all_local_plans", None)  # for a cache we do not use; it would triple the file
        self._storage.finish(self._metadata, [share.results for share in shares])
        save_config(CheckpointingConfig(_BACKEND, _BACKEND_VERSION), str(self.folder))
        return {name: record for share in shares for name, record in share.files.items()}

    def _own_share(self) -> Share:
        if not self._storage.write_buckets:
            return Share()
        try:
            return self._outbox.get_nowait()
        except queue.Empty:
            return Share(error=f"the process that wrote for rank {dist.get_rank()} was killed, perhaps for its memory")

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, planned: Any) -> AsyncRequest:
        """Our way of running megatron-core's plan."""
        self._storage, self._metadata = writer, planned[1]
        buckets = writer.write_buckets
        if not buckets:
            return AsyncRequest(None, (), [])
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []
        return AsyncRequest(
            partial(_write_in_background if self.in_background else _write, transforms),
            (dist.get_rank(), buckets, self._outbox),
            [],
            preload_fn=partial(FileSystemWriterAsync.preload_tensors, buckets, False),
        )


def told_by_rank_0(answer: Any) -> Any:
    """Rank 0's answer, on every rank. Collective."""
    box = [answer]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def file_record(path: Path) -> FileRecord:
    """Size and checksum of a file, synced to disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _write_in_background(transforms: list, rank: int, buckets: list, outbox: Outbox) -> None:
    """`_write` in the forked process, which ends with the run: it must not write into the folder of a later save."""
    gc.disable()  # collecting tensors of the parent would reach for its CUDA context
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the run, which waits for this process
    end_with_parent()
    _write(transforms, rank, buckets, outbox)


def _write(transforms: list, rank: int, buckets: list, outbox: Outbox) -> None:
    """Write this rank's files, each in a thread of its own (writing and hashing let go of the interpreter)."""
    share = Share()
    with ThreadPoolExecutor(len(buckets)) as pool:
        for written in pool.map(partial(_write_file, transforms), buckets):
            share.results += written.results
            share.files |= written.files
            share.error = share.error or written.error
    outbox.put(share)


def _write_file(transforms: list, bucket: tuple) -> Share:
    path, name, _ = bucket
    results: queue.SimpleQueue = queue.SimpleQueue()
    unfinished: queue.Queue = queue.Queue()
    unfinished.put(0)
    try:
        FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, results, unfinished, use_fsync=True)
        _, outcome = results.get_nowait()
        if isinstance(outcome, Exception):
            raise outcome
        return Share(outcome, {name: file_record(Path(path))})
    except Exception as error:  # it travels to the training process
        return Share(error=_reason(error))


def _reason(error: BaseException) -> str:
    """What the system said, where torch's own error while it closed the file came after it."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return str(found or error) or type(error).__name__
