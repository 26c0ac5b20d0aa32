"""What a run does about steps that go wrong: skip those that are not finite, and give up when they do not end."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bitlm.errors import BitLMError, DivergedError
from megatron_bitlm.training.diagnosis import Diagnosis


@dataclass
class AnomalyConfig:
    """What happens to steps that go wrong.

    Attributes:
        max_consecutive_skips: A step whose loss or gradients are not finite changes no weights and is counted; the run
            ends with a diagnosis when more than this many follow each other. 0 ends it at the first.
    """

    max_consecutive_skips: int = 5

    def validate(self) -> None:
        """Raise BitLMError naming the setting and its value."""
        if self.max_consecutive_skips < 0:
            raise BitLMError(f"anomalies.max_consecutive_skips must not be negative, got {self.max_consecutive_skips}")


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
