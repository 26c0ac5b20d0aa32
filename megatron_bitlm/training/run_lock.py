"""One process at a time in a run's folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO

from megatron_bitlm.errors import BitLMError

LOCK_FILE = "lock"
_PATIENCE_S = 120.0  # a requeued job may start before a file server has noticed that the node of the last one is gone
_HELD, _POLL_INTERVAL_S = (errno.EACCES, errno.EAGAIN), 0.5


class RunLock:
    """A lock on a file, held by a run's main process; the system lets go of it however that process ends.

    A record lock (POSIX): unlike with `flock`, processes forked by the holder do not hold it too, so that one that
    outlives a kill by a moment is not in the way.

    Args:
        path: The file; it names its holder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def acquire(self, patience_s: float | None = None) -> None:
        """Take the lock, waiting for its holder to end.

        Args:
            patience_s: How long to wait; None for two minutes.

        Raises:
            BitLMError: Somebody else still holds it; names the process and its machine.
        """
        file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 (held over the run)
        deadline = time.monotonic() + (_PATIENCE_S if patience_s is None else patience_s)
        waiting = False
        while not self._try(file):
            if time.monotonic() >= deadline:
                holder = _holder(file)
                file.close()
                raise BitLMError(
                    f"run.directory {self.path.parent} is in use by {holder}; wait for that run or choose another "
                    "run.directory"
                )
            if not waiting:
                print(f"waiting for {_holder(file)}, which uses {self.path.parent}", file=sys.stderr, flush=True)
                waiting = True
            time.sleep(_POLL_INTERVAL_S)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let go of the lock, if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _try(self, file: IO[str]) -> bool:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            print(
                f"warning: {self.path} cannot be locked on this file system ({error}); start no second process on "
                f"{self.path.parent}",
                file=sys.stderr,
                flush=True,
            )
        return True


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        known = json.loads(file.read())
        return f"process {known['pid']} on {known['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has not written its name yet
