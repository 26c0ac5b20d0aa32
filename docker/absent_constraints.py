"""Print the lines of a constraints file whose packages are not installed, so that pip leaves those that are alone.

python docker/absent_constraints.py constraints.txt > absent.txt
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path


def normalized(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def absent_constraints(lines: list[str], installed: set[str]) -> list[str]:
    """The lines that pin packages not in `installed` (normalized names); comments and blank lines are dropped."""
    pins = [line for line in lines if line.strip() and not line.startswith("#")]
    return [line for line in pins if normalized(re.split(r"[\s=<>!~;\[]", line, maxsplit=1)[0]) not in installed]


if __name__ == "__main__":
    present = {normalized(item.metadata["Name"]) for item in distributions() if item.metadata["Name"]}
    print("\n".join(absent_constraints(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines(), present)))
