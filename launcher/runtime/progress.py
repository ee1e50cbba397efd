"""How far a run is, and what is due when."""

from __future__ import annotations

import time
from dataclasses import dataclass

from launcher.config import Duration, parse_duration


@dataclass
class Progress:
    """Optimiser steps done, whole epochs done, training samples consumed.

    Everything that depends on time reads these three; nothing counts on its own. A step that the
    gradient scaler skips consumes its samples but does not count as a step.
    """

    step: int = 0
    epoch: int = 0
    samples: int = 0

    def advance(self, samples: int, samples_per_epoch: int, skipped: bool) -> None:
        """Count one global batch of `samples`."""
        self.samples += samples
        self.step += not skipped
        self.epoch = self.samples // samples_per_epoch

    def reached(self, duration: Duration) -> bool:
        """Whether a duration in epochs or steps is over."""
        return (self.epoch if duration.unit == "ep" else self.step) >= duration.amount

    def copy(self) -> Progress:
        return Progress(self.step, self.epoch, self.samples)

    def as_dict(self) -> dict[str, int]:
        return dict(vars(self))


def in_steps(text: str, steps_per_epoch: int) -> int:
    """A duration of epochs or steps in optimiser steps; "" is 0."""
    duration = parse_duration(text)
    if duration is None:
        return 0
    return int(duration.amount) * (steps_per_epoch if duration.unit == "ep" else 1)


class Every:
    """A period such as "2ep", "500step" or "10min"; "" is never."""

    def __init__(self, text: str) -> None:
        self.duration = parse_duration(text)
        self.started = time.monotonic()
        self.timed = self.duration is not None and self.duration.unit == "s"

    def elapsed(self) -> bool:
        """Whether a period in seconds is over by this process's clock; then it starts again.

        Clocks differ, so rank 0 asks this and tells the others (see engine/agreement.py).
        """
        now = time.monotonic()
        if self.duration is None or not self.timed or now - self.started < self.duration.amount:
            return False
        self.started = now
        return True

    def due(self, before: Progress, after: Progress) -> bool:
        """Whether a period in epochs or steps ended between two moments."""
        if self.duration is None or self.timed:
            return False
        amount = self.duration.amount
        if self.duration.unit == "ep":
            return after.epoch // amount > before.epoch // amount
        return after.step // amount > before.step // amount
