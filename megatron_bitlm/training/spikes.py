"""Spikes of the loss: when one is seen, and going back behind it without the data that made it.

Steps count through: after going back from step 57 to the checkpoint of step 50, steps 51, 52, ... take the samples that
follow those of step 57. Noise is keyed by sample, so nothing else changes, and a run is a function of its rewinds.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_bitlm.data.files import write_atomic
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.model.checkpoint import complete_checkpoints, read_meta
from megatron_bitlm.training.anomalies import AnomalyConfig

FORMAT, VERSION = "megatron-bitlm-rewinds", 1
_MAD_TO_SIGMA = 1.4826  # the standard deviation of a normal law over its median absolute deviation
_LEAST_SPREAD = 1e-3  # of the median, for a loss that hardly varies


def is_spike(losses: Sequence[float], config: AnomalyConfig) -> bool:
    """Whether the last `spike_patience_steps` losses all lie far above the `spike_window_steps` before them.

    Far is `spike_threshold` robust standard deviations above the median. Without a whole window there is no spike.
    """
    patience, window = config.spike_patience_steps, config.spike_window_steps
    if len(losses) < window + patience:
        return False
    usual = losses[-patience - window : -patience]
    median = statistics.median(usual)
    sigma = _MAD_TO_SIGMA * statistics.median([abs(loss - median) for loss in usual])
    limit = median + config.spike_threshold * max(sigma, _LEAST_SPREAD * abs(median))
    return min(losses[-patience:]) > limit


def spike_begins(losses: Sequence[float], config: AnomalyConfig) -> bool:
    """Whether the last step is the first of which `is_spike` holds; a function of the curve alone."""
    return is_spike(losses, config) and not is_spike(losses[:-1], config)


def num_losses_needed(config: AnomalyConfig) -> int:
    """How many of the last losses `spike_begins` looks at."""
    return config.spike_window_steps + config.spike_patience_steps + 1


def read_losses(metrics_file: Path) -> list[float]:
    """Losses of the steps of a metrics.jsonl that were not skipped."""
    if not metrics_file.exists():
        return []
    records = map(json.loads, metrics_file.read_text(encoding="utf-8").splitlines())
    return [record["loss"] for record in records if None not in (record["loss"], record["gradient_norm"])]


@dataclass
class Rewind:
    """One going back.

    Attributes:
        from_step: Step after which the spike was seen.
        to_step: Step of the checkpoint that was loaded.
        skipped_samples: Samples that the steps after `to_step` are further in the data than their number says,
            those of earlier rewinds included.
    """

    from_step: int
    to_step: int
    skipped_samples: int


class Rewinds:
    """The rewinds of a run, in order, as runs/NAME/rewinds/rewinds.json keeps them.

    Args:
        entries: In the order they happened.
    """

    def __init__(self, entries: Sequence[Rewind] = ()) -> None:
        self.entries = list(entries)

    @classmethod
    def read(cls, path: Path) -> Rewinds:
        """Those of a run's file; none where there is no file.

        Raises:
            BitLMError: The file cannot be read.
        """
        if not path.exists():
            return cls()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                raise BitLMError(f"{path} is {content['format']} version {content['version']}, not {FORMAT} {VERSION}")
            return cls([Rewind(**entry) for entry in content["rewinds"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BitLMError(f"cannot read {path}, which says where the run is in its data: {error}") from error

    def write(self, path: Path) -> None:
        """Replace the file."""
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "rewinds": self.state()}
        write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())

    def state(self) -> list[dict[str, int]]:
        """For a checkpoint's meta data."""
        return [asdict(entry) for entry in self.entries]

    def skipped_samples(self, step: int) -> int:
        """How much further in the data `step` is than without rewinds.

        Of several that went back behind the step the last one counts: it contains what was skipped before.
        """
        return next((entry.skipped_samples for entry in reversed(self.entries) if entry.to_step < step), 0)

    def add(self, from_step: int, to_step: int, samples_per_step: int) -> Rewind:
        """Go back, and leave out the samples of the steps between."""
        skipped = (from_step - to_step) * samples_per_step + self.skipped_samples(from_step)
        self.entries.append(Rewind(from_step, to_step, skipped))
        return self.entries[-1]

    def set_abandoned_aside(self, checkpoints: Path) -> None:
        """Rename the checkpoints that a later rewind went behind to step_N.rewound_R, which nothing reads."""
        renamed = False
        for step, path in complete_checkpoints(checkpoints):
            try:
                known = len(read_meta(path).get("rewinds", []))
            except BitLMError:
                continue  # damaged: dealt with when it is loaded
            for number, entry in enumerate(self.entries[known:], start=known + 1):
                if entry.to_step < step:
                    os.replace(path, path.with_name(f"{path.name}.rewound_{number}"))
                    renamed = True
                    break
        found = complete_checkpoints(checkpoints)
        if renamed and found:
            write_atomic(checkpoints / "latest", f"{found[-1][1].name}\n".encode())
