"""What looks on while a run trains: the metrics file, TensorBoard and the progress line.

The loop knows callbacks by the small protocol below, callbacks know records by their names.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from megatron_bitlm.errors import BitLMError

Record = dict[str, Any]


class Callback(Protocol):
    """Called on the main process only."""

    def on_start(self, step: int, num_steps: int) -> None:
        """Training starts after `step`, of `num_steps`."""

    def on_step(self, record: Record) -> None:
        """A step is done; `record` has its figures, with validation/* where it was validated."""

    def on_message(self, text: str) -> None:
        """Something worth a line."""

    def on_end(self) -> None:
        """Training ended or failed."""


class MetricsFile:
    """Appends every record to metrics.jsonl, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, None

    def on_start(self, step: int, num_steps: int) -> None:
        """Open the file."""
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (held over the run)

    def on_step(self, record: Record) -> None:
        """Append and flush: a killed run keeps its curve.

        Raises:
            BitLMError: The disk is full, say; a curve with holes would not be the run's.
        """
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            file, self.file = self.file, None
            with contextlib.suppress(OSError):  # it tries once more to write
                file.close()
            raise BitLMError(
                f"{self.path} cannot be written ({error}); checkpoints are kept, make room and resume the run"
            ) from error

    def on_message(self, text: str) -> None:
        """Nothing to record."""

    def on_end(self) -> None:
        """Sync and close."""
        if self.file is not None:
            os.fsync(self.file.fileno())
            self.file.close()


class TensorBoard:
    """Writes every number of a record as a scalar."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.writer = folder, None

    def on_start(self, step: int, num_steps: int) -> None:
        """Open the writer; events after `step` of a session that was killed are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def on_step(self, record: Record) -> None:
        """Add scalars; metrics.jsonl has all of them, so a disk that is full only ends this."""
        if self.writer is None:
            return
        try:
            for name, value in record.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.writer.add_scalar(name if "/" in name else f"train/{name}", value, record["step"])
        except OSError as error:
            self._give_up(error)

    def on_message(self, text: str) -> None:
        """Nothing to record."""

    def on_end(self) -> None:
        """Flush and close."""
        if self.writer is not None:
            try:
                self.writer.close()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.writer = None
        print(f"warning: no more events in {self.folder}: {error}", file=sys.stderr, flush=True)


class Progress:
    """A bar on a terminal, or one plain line every `interval_steps` in a log."""

    def __init__(self, mode: str, interval_steps: int) -> None:
        self.interval_steps = interval_steps
        self.bar = mode == "auto" and sys.stdout.isatty()
        self.rich: Any = None
        self.task: Any = None
        self.start_time, self.start_step, self.num_steps = 0.0, 0, 0

    def on_start(self, step: int, num_steps: int) -> None:
        """Start the clock and the bar."""
        self.start_time, self.start_step, self.num_steps = time.monotonic(), step, num_steps
        if self.bar:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.rich = Progress(
                TextColumn("pretrain"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.rich.start()
            self.task = self.rich.add_task("pretrain", total=num_steps, completed=step, text="")

    def on_step(self, record: Record) -> None:
        """Advance."""
        step = record["step"]
        if self.bar:
            self.rich.update(self.task, completed=step, text=_describe(record))
        elif step % self.interval_steps == 0 or step == self.num_steps:
            done, elapsed = step - self.start_step, time.monotonic() - self.start_time
            left = elapsed / max(done, 1) * (self.num_steps - step)
            print(f"step {step}/{self.num_steps}  {_describe(record)}  left {left:.0f} s", flush=True)
        if "validation/nats_per_token" in record:
            relation = "=" if record.get("validation/is_exact") else "<="
            error = record.get("validation/standard_error")
            spread = f" (+- {error:.4f})" if error is not None else ""
            self.on_message(
                f"step {step}: validation {relation} {record['validation/nats_per_token']:.4f} nats/token{spread}, "
                f"{relation} {record['validation/bits_per_byte']:.4f} bits/byte"
            )

    def on_message(self, text: str) -> None:
        """Print a line."""
        if self.bar and self.rich is not None:
            self.rich.console.print(text)
        else:
            print(text, flush=True)

    def on_end(self) -> None:
        """Stop the bar."""
        if self.rich is not None:
            self.rich.stop()


def _describe(record: Record) -> str:
    loss, norm = (math.nan if record[name] is None else record[name] for name in ("loss", "gradient_norm"))
    text = (
        f"loss {loss:.4f}  grad {norm:.3g}  lr {record['learning_rate']:.2e}  "
        f"{record['tokens_per_second']:,.0f} tokens/s"
    )
    return text + (f"  MFU {record['mfu']:.1%}" if "mfu" in record else "")
