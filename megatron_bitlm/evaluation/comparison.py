"""A BitLM beside the softmax baseline, each trained for the same time on the same data: a table and a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_bitlm.evaluation.figures import BLUE, GREEN, ORANGE, PURPLE, save_figure

_COLORS = (ORANGE, BLUE)
_REFERENCE_STYLES = ((PURPLE, (0, (6, 3))), (GREEN, (0, (2, 2))))


@dataclass
class TrainedModel:
    """A finished run and what was measured of it.

    Attributes:
        name: Of the kind of model.
        is_exact: Its likelihood is exact, not a bound.
        likelihood: nats_per_token, standard_error, bits_per_byte and num_tokens, as `likelihood_figures` has them.
        records: Of its metrics.jsonl.
        num_parameters: All of them.
        generated_tokens_per_second: Of the continuations, all prompts together.
    """

    name: str
    is_exact: bool
    likelihood: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    num_parameters: int
    generated_tokens_per_second: float

    @property
    def relation(self) -> str:
        """What stands between the negative log-likelihood and its figure."""
        return "=" if self.is_exact else "<="

    @property
    def training_seconds(self) -> float:
        """Of all steps; validation and checkpoints not counted."""
        return sum(record["seconds"] for record in self.records)

    def summary(self) -> dict[str, Any]:
        """The row of a comparison as JSON data."""
        tokens, seconds = self.records[-1]["tokens"], self.training_seconds
        return {
            "relation": self.relation,
            **{name: self.likelihood[name] for name in ("nats_per_token", "standard_error", "bits_per_byte")},
            "num_tokens": self.likelihood["num_tokens"],
            "training_seconds": seconds,
            "training_steps": self.records[-1]["step"],
            "training_tokens": tokens,
            "training_tokens_per_second": tokens / seconds,
            "num_parameters": self.num_parameters,
            "generated_tokens_per_second": self.generated_tokens_per_second,
        }

    def curve(self) -> tuple[list[float], list[float], list[float]]:
        """Training seconds, training tokens and bits per byte of every validation."""
        seconds, points = 0.0, []
        for record in self.records:
            seconds += record["seconds"]
            if "validation/bits_per_byte" in record:
                points.append((seconds, float(record["tokens"]), record["validation/bits_per_byte"]))
        first, second, third = zip(*points, strict=True) if points else ((), (), ())
        return list(first), list(second), list(third)


def describe_comparison(models: Sequence[TrainedModel]) -> str:
    """A table, and what it may be read for."""
    heading = f"{'':8} {'nats/token':>22} {'bits/byte':>10} {'train s':>8} {'tokens':>12} {'tokens/s':>9}"
    lines = [f"{heading} {'parameters':>11} {'generated/s':>12}"]
    for model in models:
        row = model.summary()
        spread = "" if row["standard_error"] is None else f" +- {row['standard_error']:.4f}"
        nats = f"{row['relation']} {row['nats_per_token']:.4f}{spread}"
        bits = f"{row['relation']} {row['bits_per_byte']:.4f}"
        lines.append(
            f"{model.name:8} {nats:>22} {bits:>10} {row['training_seconds']:>8.0f} {row['training_tokens']:>12,} "
            f"{row['training_tokens_per_second']:>9,.0f} {row['num_parameters']:>11,} "
            f"{row['generated_tokens_per_second']:>12,.0f}"
        )
    tokens = models[0].likelihood["num_tokens"]
    lines.append(
        f"Both of the same {tokens:,} held-out tokens. BitLM's figure is an upper bound, the softmax's is exact: how "
        "much of the difference is the bound's slack is not known."
    )
    return "\n".join(lines)


def plot_comparison(
    models: Sequence[TrainedModel], path: str | os.PathLike[str], reference_lines: Mapping[str, float]
) -> None:
    """Held-out bits per byte against training seconds and against training tokens, one line a model, as PNG."""
    figure = Figure(figsize=(10.4, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, column, label in zip(axes, (0, 1), ("training seconds", "training tokens, millions"), strict=True):
        for model, color in zip(models, _COLORS, strict=True):
            curve = model.curve()
            kind = "exact" if model.is_exact else "upper bound"
            places = curve[0] if column == 0 else [tokens / 1e6 for tokens in curve[1]]
            axis.plot(places, curve[2], color=color, marker="o", markersize=4, label=f"{model.name}, {kind}")
        _dress(axis, label, reference_lines)
    axes[0].set_ylabel("bits per byte of the run's validation samples")
    axes[1].legend(frameon=False, loc="center right")
    ends = ", ".join(
        f"{model.name} {model.relation.replace('<=', '≤')} {model.likelihood['bits_per_byte']:.2f}" for model in models
    )
    figure.suptitle(f"The same time, the same data; on all held-out text {ends} bits/byte", fontsize=10)
    save_figure(figure, path)


def _dress(axis: Axes, label: str, reference_lines: Mapping[str, float]) -> None:
    for (name, value), (color, style) in zip(reference_lines.items(), _REFERENCE_STYLES, strict=True):
        axis.axhline(value, color=color, linestyle=style, linewidth=1.4)
        axis.annotate(
            f"{name} {value:.2f}",
            (0.99, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=color,
            fontsize=9,
        )
    axis.set_xlabel(label)
    axis.set_xlim(left=0)
    axis.grid(color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
