"""Arrays that take long to build, kept in a folder that is whole or is built anew.

FOLDER/
    NAME.npy     one file an array
    index.json   format, version, and size and sha256 of every file
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_bitlm.data.files import sha256_file, write_atomic

FORMAT, VERSION = "bitlm-sample-index", 1
_CARD = "index.json"


def cached_arrays(
    folder: Path, names: Sequence[str], build: Callable[[], Sequence[np.ndarray]]
) -> tuple[np.ndarray, ...]:
    """The arrays in ``folder``, memory-mapped; they are built and stored there first if it is absent or damaged.

    The folder appears complete or not at all, whoever builds it at the same time.

    Args:
        names: Of the arrays, in the order ``build`` gives them.

    Raises:
        OSError: The folder can neither be read nor written.
    """
    if folder.exists() and (damage := _damage(folder, names)) is not None:
        print(f"warning: sample index {folder} {damage}; it is built anew", file=sys.stderr, flush=True)
        _remove(folder)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _store(folder, names, build())
    return tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names)


def _damage(folder: Path, names: Sequence[str]) -> str | None:
    """What is wrong with a folder, in words; None where nothing is."""
    try:
        card = json.loads((folder / _CARD).read_text())
        if (card["format"], card["version"]) != (FORMAT, VERSION):
            return "is of another release"
        files = card["files"]
        for name in (f"{name}.npy" for name in names):
            if (folder / name).stat().st_size != files[name]["bytes"]:
                return f"is damaged ({name} has another size than when it was written)"
            if sha256_file(folder / name) != files[name]["sha256"]:
                return f"is damaged ({name} does not match its checksum)"
    except FileNotFoundError as error:
        return f"is incomplete ({Path(error.filename).name} is missing)"
    except (ValueError, KeyError, TypeError):
        return f"is damaged ({_CARD} cannot be read)"
    return None


def _store(folder: Path, names: Sequence[str], arrays: Sequence[np.ndarray]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as aside:
        complete = Path(aside) / folder.name
        complete.mkdir()
        files = {}
        for name, array in zip(names, arrays, strict=True):
            path = complete / f"{name}.npy"
            with open(path, "wb") as stream:
                np.save(stream, array)
                stream.flush()
                os.fsync(stream.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        card = {"format": FORMAT, "version": VERSION, "files": files}
        write_atomic(complete / _CARD, json.dumps(card, indent=1).encode())
        try:
            os.rename(complete, folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker, and its arrays are the same
                raise


def _remove(folder: Path) -> None:
    """Takes a folder away in one step, so that no one finds half of it."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".damaged-") as aside:
        try:
            os.rename(folder, Path(aside) / folder.name)
        except FileNotFoundError:
            return  # another process was quicker
        shutil.rmtree(Path(aside) / folder.name, ignore_errors=True)
