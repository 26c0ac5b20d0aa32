"""A block of tokens taking shape: its bits over the denoising steps, and the text that they spell.

Letters: M slots of a block, K bits of a token; rows are the num_steps + 1 states from noise to clean.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megatron_bitlm.evaluation.figures import BLUE, FAINT, INK, MONO_FONT, ORANGE, printable, save_figure

_BIT_COLORS = (BLUE, "#d6d6d6", ORANGE)
_QUANTITY_LABELS = {"belief": "mean of a lone bit given its noisy value", "state": "noisy value near 0"}
_MONO_WIDTH = 0.602  # of the monospaced font, in units of its size
_MONO_CENTERED: dict[str, Any] = {
    "family": MONO_FONT,
    "ha": "center",
    "va": "center_baseline",
    "parse_math": False,
}


def plot_denoising(
    states: NDArray[np.floating],
    times: Sequence[float],
    tokens: Sequence[str] | Sequence[Sequence[str]],
    path: str | os.PathLike[str],
    *,
    quantity: str = "belief",
) -> None:
    """Draw the bits of one block over its denoising steps: noise at the top, tokens at the bottom.

    Args:
        states: float [num_steps + 1, M, K], the noisy bits a_t, most significant first.
        times: num_steps + 1 noise times, from 1 (noise) to 0 (clean).
        tokens: the text of the M final tokens, or for every row of `states` the text of the M nearest tokens,
            which is then written beside it.
        path: PNG to write.
        quantity: `belief` colours the mean of a lone bit given its state, tanh((1 − t)·a_t/t²): grey is
            undecided. `state` colours a_t itself, clipped to [−1, 1]; its first row is pure noise.

    Raises:
        ValueError: if the shapes do not agree or the quantity is unknown.
    """
    if quantity not in _QUANTITY_LABELS:
        raise ValueError(f"quantity must be one of {', '.join(_QUANTITY_LABELS)}, not {quantity!r}")
    bits = np.asarray(states, dtype=np.float64)
    row_times = np.asarray(times, dtype=np.float64)
    final_tokens, token_rows = _check_denoising(bits, row_times, tokens)
    num_rows, num_slots, num_bits = bits.shape
    page = _DenoisingPage.fit(num_rows, num_slots, num_bits, token_rows)
    figure = Figure(figsize=(page.width, page.height), dpi=160, facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, page.width), ylim=(page.height, 0))
    axis.axis("off")
    _draw_strips(axis, page, _belief(bits, row_times) if quantity == "belief" else bits)
    _draw_results(axis, page, bits[-1] >= 0, final_tokens)
    _draw_time_labels(axis, page, row_times)
    if token_rows is not None:
        _draw_token_rows(axis, page, token_rows)
    _draw_heading(axis, page, bits, row_times, quantity)
    save_figure(figure, path)


@dataclass(frozen=True)
class _DenoisingPage:
    """Where things are, in inches from the top left corner."""

    num_rows: int
    num_slots: int
    num_bits: int
    cell_width: float
    cell_height: float
    token_width: float
    num_token_characters: int

    LEFT = 0.75
    TOP = 1.32
    SLOT_GAP = 0.16
    BOTTOM = 0.85
    MIN_STRIPS_WIDTH = 5.1
    MIN_TOKENS_WIDTH = 0.9  # the column's heading

    @classmethod
    def fit(
        cls, num_rows: int, num_slots: int, num_bits: int, token_rows: Sequence[Sequence[str]] | None
    ) -> _DenoisingPage:
        longest = max((len(text) for row in token_rows or () for text in row), default=0)
        num_characters = min(longest, 10)
        return cls(
            num_rows=num_rows,
            num_slots=num_slots,
            num_bits=num_bits,
            cell_width=float(np.clip(5.6 / (num_slots * num_bits), 0.085, 0.28)),
            cell_height=float(np.clip(4.2 / num_rows, 0.03, 0.23)),
            token_width=num_characters * _MONO_WIDTH * 8 / 72 + 0.1 if num_characters else 0.0,
            num_token_characters=num_characters,
        )

    @property
    def strips_right(self) -> float:
        slots_width = self.num_slots * (self.num_bits * self.cell_width + self.SLOT_GAP) - self.SLOT_GAP
        return self.LEFT + slots_width

    @property
    def strips_bottom(self) -> float:
        return self.TOP + self.num_rows * self.cell_height

    @property
    def width(self) -> float:
        tokens_width = 0.3 + max(self.num_slots * self.token_width, self.MIN_TOKENS_WIDTH) if self.token_width else 0.0
        return max(self.strips_right, self.LEFT + self.MIN_STRIPS_WIDTH) + tokens_width + 0.3

    @property
    def height(self) -> float:
        return self.strips_bottom + self.BOTTOM

    @property
    def label_stride(self) -> int:
        """Rows from one written label to the next, so that lines of 8 points do not touch."""
        return max(1, math.ceil(0.15 / self.cell_height))

    def slot_left(self, slot: int) -> float:
        return self.LEFT + slot * (self.num_bits * self.cell_width + self.SLOT_GAP)

    def row_middle(self, row: int) -> float:
        return self.TOP + (row + 0.5) * self.cell_height

    def labelled_rows(self) -> list[int]:
        """Every `label_stride`-th row, counted back from the last one."""
        return list(range(self.num_rows - 1, -1, -self.label_stride))


def _check_denoising(
    states: NDArray[np.float64],
    times: NDArray[np.float64],
    tokens: Sequence[str] | Sequence[Sequence[str]],
) -> tuple[list[str], list[list[str]] | None]:
    """Printable final tokens [M], and those of every row [num_steps + 1][M] where given."""
    if states.ndim != 3 or times.shape != states.shape[:1]:
        raise ValueError(f"states {states.shape} and times {times.shape} must be [rows, slots, bits] and [rows]")
    num_rows, num_slots, _ = states.shape
    if all(isinstance(text, str) for text in tokens):
        final, rows = [printable(str(text)) for text in tokens], None
    else:
        rows = [[printable(text) for text in row] for row in tokens]
        final = rows[-1]
    if len(final) != num_slots or (rows is not None and [len(row) for row in rows] != [num_slots] * num_rows):
        raise ValueError(f"tokens must hold {num_slots} texts, or {num_rows} rows of {num_slots} texts")
    return final, rows


def _belief(states: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of a uniform ±1 bit given a_t = (1 − t)·a_0 + t·ε: tanh((1 − t)·a_t/t²), the sign at t = 0."""
    t = np.maximum(times, 1e-3)[:, None, None]
    return np.tanh((1 - times)[:, None, None] * states / t**2)


def _draw_strips(axis: Axes, page: _DenoisingPage, values: NDArray[np.float64]) -> None:
    colors = LinearSegmentedColormap.from_list("bits", _BIT_COLORS)
    for slot in range(page.num_slots):
        left = page.slot_left(slot)
        axis.pcolormesh(
            left + page.cell_width * np.arange(page.num_bits + 1),
            page.TOP + page.cell_height * np.arange(page.num_rows + 1),
            values[:, slot],
            cmap=colors,
            vmin=-1,
            vmax=1,
            edgecolors="white",
            linewidth=0.6 if page.cell_height > 0.1 else 0.2,
        )


def _draw_results(axis: Axes, page: _DenoisingPage, bits: NDArray[np.bool_], tokens: Sequence[str]) -> None:
    """Beneath every strip its bits as digits, and the token they spell."""
    strip_width = page.num_bits * page.cell_width
    digit_size = min(9.0, page.cell_width * 72 / _MONO_WIDTH * 0.85)
    for slot, text in enumerate(tokens):
        left = page.slot_left(slot)
        for place, bit in enumerate(bits[slot]):
            axis.text(
                left + (place + 0.5) * page.cell_width,
                page.strips_bottom + 0.12,
                str(int(bit)),
                color=_BIT_COLORS[-1] if bit else _BIT_COLORS[0],
                fontsize=digit_size,
                **_MONO_CENTERED,
            )
        size = min(17.0, (strip_width + page.SLOT_GAP * 0.6) * 72 / (_MONO_WIDTH * max(len(text), 1)))
        axis.text(
            left + strip_width / 2,
            page.strips_bottom + 0.48,
            text,
            color=INK,
            fontsize=size,
            fontweight="bold",
            **_MONO_CENTERED,
        )


def _draw_time_labels(axis: Axes, page: _DenoisingPage, times: NDArray[np.float64]) -> None:
    for row in page.labelled_rows():
        axis.text(
            page.LEFT - 0.1,
            page.row_middle(row),
            f"{times[row]:.2f}",
            color=FAINT,
            fontsize=8,
            ha="right",
            va="center_baseline",
        )
    axis.text(page.LEFT - 0.1, page.TOP - 0.1, "time t", color=FAINT, fontsize=8, ha="right", va="bottom")
    for slot in range(page.num_slots):
        axis.text(
            page.slot_left(slot) + page.num_bits * page.cell_width / 2,
            page.TOP - 0.1,
            f"token {slot + 1}",
            color=FAINT,
            fontsize=8,
            ha="center",
            va="bottom",
        )


def _draw_token_rows(axis: Axes, page: _DenoisingPage, rows: Sequence[Sequence[str]]) -> None:
    """Beside the strips the text each row decodes to: faint while a token differs from the final one."""
    left = page.width - 0.2 - max(page.num_slots * page.token_width, page.MIN_TOKENS_WIDTH)
    axis.text(left, page.TOP - 0.1, "nearest tokens", color=FAINT, fontsize=8, ha="left", va="bottom")
    limit = page.num_token_characters
    for row in page.labelled_rows():
        for slot, text in enumerate(rows[row]):
            settled = text == rows[-1][slot]
            axis.text(
                left + slot * page.token_width,
                page.row_middle(row),
                text if len(text) <= limit else text[: limit - 1] + "…",
                color=INK if settled else "#a8a8a8",
                fontsize=8,
                fontweight="bold" if settled else "normal",
                family=MONO_FONT,
                ha="left",
                va="center_baseline",
                parse_math=False,
            )


def _draw_heading(
    axis: Axes, page: _DenoisingPage, states: NDArray[np.float64], times: NDArray[np.float64], quantity: str
) -> None:
    """What is seen, and the key to the colours."""
    num_steps, num_slots, num_bits = states.shape[0] - 1, *states.shape[1:]
    unsettled = ((states >= 0) != (states[-1] >= 0)).any(axis=(1, 2))
    settled_at = times[int(np.flatnonzero(unsettled)[-1]) + 1] if unsettled.any() else times[0]

    def write(left: float, top: float, text: str, color: str = INK, size: float = 8, **style: Any) -> None:
        style.setdefault("ha", "left")
        axis.text(left, top, text, color=color, fontsize=size, va="center", **style)

    subject = "1 token" if num_slots == 1 else f"{num_slots} tokens"
    manner = "decided" if num_slots == 1 else "decided together"
    write(
        0.2,
        0.34,
        f"{subject} of {num_bits} bits, {manner} in {num_steps} steps",
        size=12.5,
        fontweight="bold",
    )
    write(0.2, 0.6, f"from noise down to text; no bit changes sign after t = {settled_at:.2f}", size=9)
    ramp = LinearSegmentedColormap.from_list("bits", _BIT_COLORS)
    axis.imshow(np.linspace(-1, 1, 64)[None], cmap=ramp, aspect="auto", extent=(0.6, 1.8, 0.92, 0.8))
    axis.set(xlim=(0, page.width), ylim=(page.height, 0))
    write(0.55, 0.86, "bit 0", BLUE, ha="right")
    write(1.85, 0.86, "bit 1", ORANGE)
    write(2.3, 0.86, f"grey: undecided ({_QUANTITY_LABELS[quantity]})", FAINT)
