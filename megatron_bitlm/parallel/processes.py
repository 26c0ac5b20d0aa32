"""Helper processes that end with the process that started them, and what they send back."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import tempfile
import threading
from typing import Any


def end_with_parent() -> None:
    """Initializer of a helper process: it exits as soon as its parent is gone, even if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Outbox:
    """One object of any size from a forked process to its parent, which looks for it when the process has ended.

    It lies in a file without a name, which both have open: unlike a pipe it never makes the writer wait for a reader,
    and unlike a queue that a server process holds it costs no process.
    """

    def __init__(self) -> None:
        # Where there is no file in memory, one on disk.
        in_memory = hasattr(os, "memfd_create")
        self._file = open(os.memfd_create("outbox"), "w+b") if in_memory else tempfile.TemporaryFile()  # noqa: SIM115

    def put(self, item: Any) -> None:
        """Leave `item` for the parent."""
        pickle.dump(item, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """What was left.

        Raises:
            queue.Empty: Nothing, or not all of it: the writer was killed.
        """
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError) as error:
            raise queue.Empty from error
