"""What every benchmark shares: variants take turns in one process, and each is compared with one of them turn by turn.

A change of clock or of load then meets all variants alike, so the ratio within a turn is steadier than either time.
Nothing here passes or fails on a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from megatron_bitlm.errors import BitLMError

Figures = dict[str, Any]


@dataclass(kw_only=True)
class BenchmarkConfig:
    """How to measure.

    Attributes:
        device: `cpu`, `cuda`, or `auto` for a GPU where there is one.
        num_warmup: Turns of every variant that are not counted.
        num_repetitions: Turns that are.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_warmup: int = 1
    num_repetitions: int = 5

    def validate(self) -> None:
        """Raise BitLMError naming the setting and its value."""
        if self.num_repetitions < 1:
            raise BitLMError(f"num_repetitions must be at least 1, got {self.num_repetitions}")
        if self.num_warmup < 0:
            raise BitLMError(f"num_warmup must not be negative, got {self.num_warmup}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise BitLMError("device is cuda, but PyTorch finds no CUDA device here; use device cpu")

    def torch_device(self) -> torch.device:
        """The device that `device` means."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


@dataclass
class Turns:
    """Seconds by variant, one value a turn.

    Attributes:
        seconds: By the clock on the wall; on a GPU between two events.
        cpu_seconds: Of this process's threads together. On a shared machine they are the steadier of the two for work
            of one thread; they leave out waiting for files and for a GPU.
    """

    seconds: dict[str, list[float]]
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Comparison:
    """Times of every variant, turn by turn, against one of them.

    Attributes:
        baseline: The variant that the others are compared with.
        turns: From `take_turns`.
        amounts: By variant, what one call works off, in `unit`s; empty where only times matter.
        unit: For example `tokens`.
        peak_bytes: By variant, from `megatron_bitlm.benchmarks.memory`; None where it could not be measured.
    """

    baseline: str
    turns: Turns
    amounts: dict[str, float] = field(default_factory=dict)
    unit: str = ""
    peak_bytes: dict[str, int | None] = field(default_factory=dict)

    def figures(self) -> dict[str, Figures]:
        """By variant: times, their ratio to the baseline's in the same turn, rates and the ratio of rates, memory."""
        return {name: self._figures(name) for name in self.turns.seconds}

    def _figures(self, name: str) -> Figures:
        own, other = (np.array(self.turns.seconds[key]) for key in (name, self.baseline))
        found: Figures = {"seconds": _spread(own), "time_ratio": _spread(own / other), "turns": own.tolist()}
        if self.amounts:
            amount, base = self.amounts[name], self.amounts[self.baseline]
            found[f"{self.unit}_per_second"] = _spread(amount / own)
            found["rate_ratio"] = _spread((amount / own) / (base / other))
        if self.turns.cpu_seconds:
            own, other = (np.array(self.turns.cpu_seconds[key]) for key in (name, self.baseline))
            found |= {"cpu_seconds": _spread(own), "cpu_time_ratio": _spread(own / other), "cpu_turns": own.tolist()}
        if name in self.peak_bytes:
            peak, base_peak = self.peak_bytes[name], self.peak_bytes.get(self.baseline)
            found["peak_bytes"] = peak
            found["peak_ratio"] = peak / base_peak if peak is not None and base_peak else None
        return found

    def table(self) -> str:
        """The figures for reading: medians, with the quartiles in parentheses."""
        rows = [["", "median ms", "quartiles", "min to max", f"time / {self.baseline}", "CPU time / same"]]
        if self.amounts:
            rows[0] += [f"{self.unit}/s", f"rate / {self.baseline}"]
        if self.peak_bytes:
            rows[0] += ["peak MB", "peak / same"]
        for name, found in self.figures().items():
            rows.append([name, *_row(found, self.unit if self.amounts else None, bool(self.peak_bytes))])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        )


def take_turns(variants: Mapping[str, Callable[[], object]], config: BenchmarkConfig, device: torch.device) -> Turns:
    """Times every variant: all of them once, again and again (A B A B), after the warm-up turns.

    On a GPU a turn is the time between two CUDA events around the call, with nothing left to do before the first.
    """
    turns = Turns({name: [] for name in variants}, {name: [] for name in variants})
    for turn in range(config.num_warmup + config.num_repetitions):
        for name, run in variants.items():
            cpu_start = time.process_time()
            taken = _time_on_gpu(run, device) if device.type == "cuda" else _time_on_cpu(run)
            if turn >= config.num_warmup:
                turns.seconds[name].append(taken)
                turns.cpu_seconds[name].append(time.process_time() - cpu_start)
    return turns


def _time_on_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _time_on_gpu(run: Callable[[], object], device: torch.device) -> float:
    with torch.cuda.device(device):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3


def _spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {
        "median": median,
        "quartile_low": low,
        "quartile_high": high,
        "min": float(values.min()),
        "max": float(values.max()),
    }


def _row(found: Figures, unit: str | None, with_memory: bool) -> list[str]:
    seconds = {key: value * 1e3 for key, value in found["seconds"].items()}
    cells = [
        _three_digits(seconds["median"]),
        f"{_three_digits(seconds['quartile_low'])} to {_three_digits(seconds['quartile_high'])}",
        f"{_three_digits(seconds['min'])} to {_three_digits(seconds['max'])}",
        _ratio(found["time_ratio"]),
        _ratio(found["cpu_time_ratio"]) if "cpu_time_ratio" in found else "-",
    ]
    if unit is not None:
        cells += [f"{found[f'{unit}_per_second']['median']:,.0f}", _ratio(found["rate_ratio"])]
    if with_memory:
        peak, ratio = found.get("peak_bytes"), found.get("peak_ratio")
        cells += ["-" if peak is None else f"{peak / 1e6:,.1f}", "-" if ratio is None else f"{ratio:.2f}"]
    return cells


def _three_digits(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 2
    return f"{value:,.{digits}f}"


def _ratio(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['quartile_low']:.2f} to {spread['quartile_high']:.2f})"
