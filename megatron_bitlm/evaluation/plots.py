"""Reading a run's metrics and drawing its loss beside what counting alone reaches."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.evaluation.denoising import plot_denoising
from megatron_bitlm.evaluation.figures import BLUE, GREEN, INK, ORANGE, PURPLE, save_figure

__all__ = ["plot_denoising", "plot_loss", "read_metrics"]

_REFERENCE_STYLES = ((PURPLE, (0, (6, 3))), (GREEN, (0, (2, 2))), (INK, (0, (6, 2, 1, 2))))
_METRIC_LABELS = {"bits_per_byte": "bits/byte", "nats_per_token": "nats/token"}


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl`, in file order; a last line cut off by a kill is left out.

    Raises:
        BitLMError: if the file is missing, or a line before the last is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise BitLMError(f"{path} does not exist: give the metrics.jsonl of a run folder.")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            # Only the text after the last line break can be a line still being written.
            if number == len(lines):
                break
            raise BitLMError(f"{path}, line {number} is not JSON ({error.msg}): the file is damaged.") from error
        if not isinstance(record, dict):
            raise BitLMError(f"{path}, line {number} is not a JSON object: the file is damaged.")
        records.append(record)
    return records


def plot_loss(
    records: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    reference_lines: Mapping[str, float] | None = None,
    *,
    metric: str = "bits_per_byte",
    loss_reference_lines: Mapping[str, float] | None = None,
    time_bucket_prefix: str = "error_by_time/",
) -> None:
    """Draw training loss, the validation bound with its baselines, and the error by noise time where logged.

    Args:
        records: dicts with `step` and any of `loss`, `validation/<metric>`, `<time_bucket_prefix><bucket>`.
            A step logged twice (a resumed run) counts with its later value.
        path: PNG to write.
        reference_lines: name to value in the unit of `metric`, drawn across the validation panel.
        metric: `bits_per_byte` or `nats_per_token`.
        loss_reference_lines: name to value in the unit of the training loss, drawn across its panel.
        time_bucket_prefix: what the keys of the errors by noise time begin with.

    Raises:
        BitLMError: if no record holds a loss.
        ValueError: if the metric is unknown.
    """
    if metric not in _METRIC_LABELS:
        raise ValueError(f"metric must be one of {', '.join(_METRIC_LABELS)}, not {metric!r}")
    if not _series(records, "loss")[0].size:
        raise BitLMError(f"No training loss in the records, so {path} cannot be drawn.")
    buckets = sorted({key for record in records for key in record if key.startswith(time_bucket_prefix)})
    num_panels = 3 if buckets else 2
    figure = Figure(figsize=(5.2 * num_panels, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots(1, num_panels)
    _draw_training_loss(axes[0], records, loss_reference_lines or {})
    _draw_validation(axes[1], records, metric, reference_lines or {})
    if buckets:
        _draw_time_buckets(axes[2], records, buckets, time_bucket_prefix)
    for axis in axes:
        axis.set_xlabel("optimizer step")
        axis.set_xlim(0, max(1, *(int(record["step"]) for record in records)))
        axis.grid(color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _is_exact(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the run is a softmax model's, whose loss and validation are cross-entropies of tokens."""
    return any(record.get("validation/is_exact") for record in records)


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and finite values of one key, by step; the later record of a step wins."""
    values = {int(record["step"]): float(record[key]) for record in records if record.get(key) is not None}
    steps = np.array(sorted(values), dtype=np.float64)
    series = np.array([values[int(step)] for step in steps], dtype=np.float64)
    finite = np.isfinite(series)
    return steps[finite], series[finite]


def _smooth(values: NDArray[np.float64], num_steps: int) -> NDArray[np.float64]:
    """Centred mean over `num_steps` values: narrower over the steep start, cut off at the end."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(values.size)
    reach = np.minimum(places, num_steps // 2)
    ends = np.minimum(places + reach, values.size - 1) + 1
    return (sums[ends] - sums[places - reach]) / (ends - places + reach)


def _draw_references(axis: Axes, reference_lines: Mapping[str, float]) -> None:
    for index, (name, value) in enumerate(reference_lines.items()):
        color, style = _REFERENCE_STYLES[index % len(_REFERENCE_STYLES)]
        axis.axhline(value, color=color, linestyle=style, linewidth=1.4)
        axis.annotate(
            f"{name} {value:.2f}",
            (0.99, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=color,
            fontsize=9,
        )


def _draw_training_loss(axis: Axes, records: Sequence[Mapping[str, Any]], reference_lines: Mapping[str, float]) -> None:
    steps, losses = _series(records, "loss")
    smoothed = _smooth(losses, max(1, losses.size // 25))
    axis.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8, label="each step")
    axis.plot(steps, smoothed, color=BLUE, linewidth=2, label="smoothed")
    _draw_references(axis, reference_lines)
    axis.set_ylabel("training loss (nats per token)" if _is_exact(records) else "training loss (per bit)")
    axis.set_title(
        f"Training loss: {smoothed[0]:.3f} at first, {smoothed[-1]:.3f} at step {steps[-1]:.0f}", fontsize=10
    )
    axis.legend(frameon=False, loc="upper right")


def _draw_validation(
    axis: Axes, records: Sequence[Mapping[str, Any]], metric: str, reference_lines: Mapping[str, float]
) -> None:
    unit = _METRIC_LABELS[metric]
    steps, bounds = _series(records, f"validation/{metric}")
    axis.set_ylabel(f"held-out negative log-likelihood ({unit})")
    _draw_references(axis, reference_lines)
    if not steps.size:
        axis.set_title("No validation was run", fontsize=10)
        return
    is_exact = _is_exact(records)
    label, figure = ("exact", "likelihood =") if is_exact else ("upper bound", "bound ≤")
    axis.plot(steps, bounds, color=ORANGE, linewidth=2, marker="o", markersize=4, label=label)
    standings = [f"{'below' if bounds[-1] < value else 'above'} {name}" for name, value in reference_lines.items()]
    standing = f": {', '.join(standings)}" if standings else ""
    axis.set_title(f"Held-out {figure} {bounds[-1]:.2f} {unit}{standing}", fontsize=10)
    axis.legend(frameon=False, loc="best")


def _draw_time_buckets(axis: Axes, records: Sequence[Mapping[str, Any]], buckets: Sequence[str], prefix: str) -> None:
    # Cividis runs from dark to light for every kind of colour vision; its palest end would vanish on white.
    colors = colormaps["cividis"](np.linspace(0.9, 0.0, len(buckets)))
    for key, color in zip(buckets, colors, strict=True):
        steps, losses = _series(records, key)
        smoothed = _smooth(losses, max(1, losses.size // 15))
        axis.plot(steps, smoothed, color=color, linewidth=1.6, label=key.removeprefix(prefix))
    axis.set_ylabel("squared error per bit, smoothed")
    axis.set_title("Training error by noise time t (0 clean, 1 noise)", fontsize=10)
    axis.legend(frameon=False, fontsize=8, title="t", loc="upper right", ncols=2 if len(buckets) > 5 else 1)
