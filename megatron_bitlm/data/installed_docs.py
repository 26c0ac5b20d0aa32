"""The documentation that comes with Python: docstrings of the standard library and of installed packages.

Sources are parsed, never imported. The order depends only on module paths and text, not on the file system or
on where things are installed, and looks random by module, so that a contiguous split is a split by module.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import PurePath

from megatron_bitlm.data.workers import pool_context
from megatron_bitlm.parallel.processes import end_with_parent

MIN_NUM_CHARS = 40
MAX_NUM_BYTES = 20_000_000
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})
_OWN_PACKAGE = "megatron_bitlm"  # there or not depending on how it was installed
_BATCH_NUM_MODULES = 100


def installed_docs(num_workers: int = 1, *, max_num_bytes: int = MAX_NUM_BYTES) -> list[str]:
    """Docstrings of modules, classes and functions, each once, in a fixed pseudo-random order of modules.

    Args:
        num_workers: processes that parse sources; the result does not depend on it.
        max_num_bytes: stop after this many UTF-8 bytes of text.

    Returns:
        Documents of at least 40 characters, cleaned of indentation.
    """
    modules = _modules_in_order()
    batches = [modules[i : i + _BATCH_NUM_MODULES] for i in range(0, len(modules), _BATCH_NUM_MODULES)]
    seen: dict[str, None] = {}
    num_bytes = 0
    for documents in _parsed(batches, num_workers):
        for document in documents:
            if document in seen:
                continue
            num_bytes += len(document.encode())
            if num_bytes > max_num_bytes:
                return list(seen)
            seen[document] = None
    return list(seen)


def _parsed(batches: list[list[str]], num_workers: int) -> Iterator[list[str]]:
    if num_workers <= 1:
        yield from map(_docstrings, batches)
        return
    with ProcessPoolExecutor(num_workers, mp_context=pool_context(), initializer=end_with_parent) as pool:
        try:
            yield from pool.map(_docstrings, batches)
        finally:
            pool.shutdown(cancel_futures=True)


def _modules_in_order() -> list[str]:
    paths = sysconfig.get_paths()
    found: dict[str, str] = {}
    for root in dict.fromkeys([paths["stdlib"], paths["purelib"], paths["platlib"]]):
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and name != _OWN_PACKAGE]
            for name in files:
                if name.endswith(".py"):
                    path = os.path.join(folder, name)
                    found.setdefault(PurePath(os.path.relpath(path, root)).as_posix(), path)
    order = sorted(found, key=lambda relative: (hashlib.sha256(relative.encode()).digest(), relative))
    return [found[relative] for relative in order]


def _docstrings(paths: list[str]) -> list[str]:
    """Docstrings of some source files in order; files that this Python cannot parse have none."""
    collecting = gc.isenabled()
    gc.disable()  # syntax trees hold no cycles, and collecting them would take most of the time
    try:
        return [text for path in paths for text in _docstrings_of(path)]
    finally:
        if collecting:
            gc.enable()


def _docstrings_of(path: str) -> list[str]:
    try:
        with open(path, "rb") as stream:
            source = stream.read()
        if b'"""' not in source and b"'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's code
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    texts = (inspect.cleandoc(raw) for raw in _raw_docstrings(tree))
    return [text for text in texts if len(text) >= MIN_NUM_CHARS and _is_text(text)]


def _raw_docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        raw = ast.get_docstring(node, clean=False)
        if raw is not None:
            yield raw
    for name in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, name, ()) if not isinstance(node, ast.expr) else ():
            yield from _raw_docstrings(child)


def _is_text(text: str) -> bool:
    """Whether the text has a UTF-8 form (a docstring may hold lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
