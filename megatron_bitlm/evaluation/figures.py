"""What the pictures share: colours that colour-blind readers can tell apart, and files never half-written.

Figures are built as objects and drawn with the Agg canvas, without pyplot's global state, so that they work
in any thread and on machines without a display.
"""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

# Okabe and Ito's palette, and two greys.
BLUE, ORANGE, GREEN, PURPLE, INK, FAINT = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#222222", "#808080"
MONO_FONT = "DejaVu Sans Mono"


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG; an older picture at `path` is replaced only once the new one is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            FigureCanvasAgg(figure).print_png(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def printable(text: str) -> str:
    """The text as a Python string literal, with what the plots' font cannot show as escapes."""
    font = get_font(findfont(FontProperties(family=MONO_FONT)))
    return "".join(
        character if font.get_char_index(ord(character)) else ascii(character)[1:-1] for character in repr(text)
    )
