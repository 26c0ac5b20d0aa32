"""Progress of a long run over a corpus: a bar on a terminal, a plain line per interval in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO


class CorpusProgress:
    """Shows documents, tokens per second and time left on standard error.

    Args:
        total_input_bytes: bytes of the whole input, None if unknown (then no time left is shown).
        interval_seconds: time between lines in a log.
        done_input_bytes: bytes that an earlier run had finished.
        stream: where to write.
    """

    def __init__(
        self,
        total_input_bytes: int | None,
        interval_seconds: float,
        done_input_bytes: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self._total = total_input_bytes
        self._interval = interval_seconds
        self._stream = stream or sys.stderr
        self._started = self._last_line = time.monotonic()
        self._first = self._done = done_input_bytes
        self._num_documents = self._num_tokens = 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> CorpusProgress:
        if self._stream.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                "{task.description}",
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                "{task.fields[text]}",
            )
            self._bar = progress.Progress(*columns, console=Console(file=self._stream))
            self._task = self._bar.add_task("preprocess", total=self._total, completed=self._done, text="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            print(f"preprocess: {self._text()}", file=self._stream, flush=True)

    def advance(self, num_documents: int, num_tokens: int, num_input_bytes: int) -> None:
        """Counts a finished unit."""
        self._num_documents += num_documents
        self._num_tokens += num_tokens
        self._done += num_input_bytes
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, text=self._text())
        elif now - self._last_line >= self._interval:
            self._last_line = now
            print(f"preprocess: {self._text()}", file=self._stream, flush=True)

    def _text(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        text = f"{self._num_documents:,} documents, {self._num_tokens / seconds:,.0f} tokens/s"
        progressed = self._done - self._first
        if self._total is not None and progressed > 0:
            left = max(self._total - self._done, 0) * seconds / progressed
            text += f", {min(100.0, 100 * self._done / max(self._total, 1)):.0f}% read, {left:,.0f} s left"
        return text
