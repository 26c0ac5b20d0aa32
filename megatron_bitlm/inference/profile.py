"""The entropy rate measured with a checkpoint, in a file beside its meta.json.

entropy_profile.json
    format, version; meta_sha256: of the checkpoint it was measured with; edges, rates: nats per unit of log-SNR by bin
    of log-SNR; measured_on: on what; sha256: of all the rest

The checkpoint's own files stay as they are. Without the file, the entropy grid and the noise gate follow the rate of
independent uniform bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bitlm.data.files import sha256_file, write_atomic
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.path import TabulatedTime
from megatron_bitlm.model.checkpoint import META_FILE

FORMAT, VERSION, PROFILE_FILE = "bitlm-entropy-profile", 1, "entropy_profile.json"


def write_profile(
    checkpoint: Path,
    edges: Sequence[float] | np.ndarray,
    rates: Sequence[float] | np.ndarray,
    *,
    measured_on: dict[str, Any],
    replace: bool = False,
) -> Path:
    """Store a profile beside a checkpoint's meta.json; returns the file.

    Args:
        checkpoint: Step folder.
        edges: J + 1 increasing log-SNRs.
        rates: J entropy rates, nats per unit of log-SNR.
        measured_on: What is worth knowing of the measurement.
        replace: Take the place of an older profile.

    Raises:
        BitLMError: There is one already, or values that are no profile.
    """
    check_free(checkpoint, replace=replace)
    _tabulated(edges, rates, checkpoint / PROFILE_FILE)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "meta_sha256": sha256_file(checkpoint / META_FILE),
        "edges": [float(edge) for edge in edges],
        "rates": [float(rate) for rate in rates],
        "measured_on": measured_on,
    }
    write_atomic(
        checkpoint / PROFILE_FILE, (json.dumps(record | {"sha256": _digest(record)}, indent=1) + "\n").encode()
    )
    return checkpoint / PROFILE_FILE


def check_free(checkpoint: Path, *, replace: bool) -> None:
    """Raise BitLMError where a profile is stored already and is not to be replaced."""
    file = checkpoint / PROFILE_FILE
    if file.exists() and not replace:
        raise BitLMError(f"{file} exists and is left as it is; give --replace to measure anew")


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """The file's content, or None where a checkpoint was not calibrated.

    Raises:
        BitLMError: A file that is damaged, of another version, or of another checkpoint.
    """
    file = checkpoint / PROFILE_FILE
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        stored = record.pop("sha256")
        is_whole = stored == _digest(record)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BitLMError(f"cannot read {file} ({error}); delete it, or run bitlm calibrate --replace") from error
    if not is_whole:
        raise BitLMError(f"{file} does not match its checksum; delete it, or run bitlm calibrate --replace")
    if record.get("format") != FORMAT or record.get("version") != VERSION:
        raise BitLMError(f"{file} is not a {FORMAT} of version {VERSION}; it was written by another release")
    if record["meta_sha256"] != sha256_file(checkpoint / META_FILE):
        raise BitLMError(f"{file} was measured with another checkpoint; run bitlm calibrate --replace")
    return record


def read_profile(checkpoint: Path) -> TabulatedTime | None:
    """The profile of a step folder, or None where it was not calibrated.

    Raises:
        BitLMError: As `read_record`.
    """
    record = read_record(checkpoint)
    return None if record is None else _tabulated(record["edges"], record["rates"], checkpoint / PROFILE_FILE)


def bin_masses(edges: Sequence[float] | np.ndarray, rates: Sequence[float] | np.ndarray) -> np.ndarray:
    """Nats of every bin, its rate times its width: the weights of a `TabulatedTime`."""
    return np.asarray(rates, np.float64) * np.diff(np.asarray(edges, np.float64))


def _tabulated(edges: Sequence[float] | np.ndarray, rates: Sequence[float] | np.ndarray, file: Path) -> TabulatedTime:
    try:
        return TabulatedTime(edges, bin_masses(edges, rates))
    except ValueError as error:
        raise BitLMError(f"{file} would hold no entropy profile: {error}") from error


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
