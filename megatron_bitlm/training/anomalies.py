"""What a run does about steps that go wrong: skip those that are not finite, and give up when they do not end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_bitlm.errors import BitLMError, DivergedError
from megatron_bitlm.training.diagnosis import Diagnosis


@dataclass
class AnomalyConfig:
    """What happens to steps that go wrong.

    Attributes:
        max_consecutive_skips: A step whose loss or gradients are not finite changes no weights and is counted; the run
            ends with a diagnosis when more than this many follow each other. 0 ends it at the first.
        spike_action: When the loss jumps: nothing (`off`), a `warn`ing, or `rewind` to the newest checkpoint before it
            and go on with the data after it.
        spike_window_steps: Steps whose losses are the usual ones.
        spike_threshold: A loss is far when it lies this many robust standard deviations (1.4826 times the median
            absolute deviation) above the median of the usual ones.
        spike_patience_steps: Losses in a row that must be far to be a spike.
        max_rewinds: A run that would have to go back more often ends.
    """

    max_consecutive_skips: int = 5
    spike_action: Literal["off", "warn", "rewind"] = "warn"
    spike_window_steps: int = 128
    spike_threshold: float = 10.0
    spike_patience_steps: int = 3
    max_rewinds: int = 3

    def validate(self) -> None:
        """Raise BitLMError naming the setting and its value."""
        least = {"max_consecutive_skips": 0, "spike_window_steps": 2, "spike_patience_steps": 1, "max_rewinds": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise BitLMError(f"anomalies.{name} must be at least {value}, got {getattr(self, name)}")
        if self.spike_action not in ("off", "warn", "rewind"):
            raise BitLMError(f"anomalies.spike_action must be off, warn or rewind, got {self.spike_action!r}")
        if not 0 < self.spike_threshold < math.inf:
            raise BitLMError(f"anomalies.spike_threshold must be positive, got {self.spike_threshold}")


class SkippedSteps:
    """Counts the steps that were skipped; the same on every rank.

    Args:
        max_consecutive: More than this many in a row end the run.
    """

    def __init__(self, max_consecutive: int) -> None:
        self.max_consecutive = max_consecutive
        self.total = self.consecutive = 0

    def count(self, skipped: bool) -> None:
        """Note a step."""
        self.total += int(skipped)
        self.consecutive = self.consecutive + 1 if skipped else 0

    @property
    def too_many(self) -> bool:
        """Whether the run should end."""
        return self.consecutive > self.max_consecutive

    def diverged(self, diagnosis: Diagnosis, where: str) -> DivergedError:
        """The error to end with, after `diagnosis` was written to `where`."""
        return DivergedError(
            f"{self.consecutive} steps in a row were not finite (anomalies.max_consecutive_skips "
            f"{self.max_consecutive}), the last is {diagnosis.sentence()}; see {where}; the checkpoints before are "
            "kept: mend the data of these samples, or start another run.directory with a lower "
            "optimizer.learning_rate or optimizer.clip_grad"
        )

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"total": self.total, "consecutive": self.consecutive}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from a checkpoint's."""
        self.total, self.consecutive = state["total"], state["consecutive"]
