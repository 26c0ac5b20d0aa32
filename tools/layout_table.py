"""Write the table of docs/parallelism.md: how far ten optimiser steps of every layout are from those of one process.

Usage: python -m tools.layout_table        (from the repository's root; some minutes on two cores)
"""

import tempfile
from pathlib import Path

import torch

from tests.distributed.layout_matrix import BF16_NAMES, FIGURES, NAMES, largest_differences, reference_of, run_matrix

TARGET = Path(__file__).parents[1] / "docs" / "parallelism.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
_HEADINGS = {
    "loss": "loss",
    "gradient_norm": "gradient norm",
    "gradient_norm/backbone": "of the backbone",
    "gradient_norm/head": "of the head",
    "validation/nats_per_token": "validation bound",
}


def render(records: dict[str, list[dict]]) -> str:
    """The table in Markdown."""
    lines = ["| layout | " + " | ".join(_HEADINGS[figure] for figure in FIGURES) + " |"]
    lines.append("|---" * (1 + len(FIGURES)) + "|")
    for name in (*NAMES, *BF16_NAMES):
        found = largest_differences(records[name], records[reference_of(name)])
        lines.append(f"| {name} | " + " | ".join(f"{found[figure]:.1e}" for figure in FIGURES) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every layout and rewrite the table."""
    torch.set_num_threads(1)
    before, _, rest = TARGET.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    with tempfile.TemporaryDirectory() as folder:
        table = render(run_matrix(Path(folder)))
    TARGET.write_text(before + BEGIN + table + END + after, encoding="utf-8")
    print(table, end="")


if __name__ == "__main__":
    main()
