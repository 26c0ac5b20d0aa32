"""Files that are never half-written and never overwritten."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HASH_CHUNK_NUM_BYTES = 1 << 22


def write_atomic(path: Path, content: bytes) -> None:
    """Writes ``content`` beside ``path``, flushes it to disk and renames it into place."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill beside ``path``, which gets that name at the end of the context, or is removed on an error."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.mkdir(parents=True)
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_HASH_CHUNK_NUM_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
