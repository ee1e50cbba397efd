"""Where a rank's time goes: perf/*."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Timing:
    """Where this rank's time since the last record went, in seconds; steps of the attempt."""

    attempt: float  # when it began, and at which step
    first: int
    began: float
    data: float = 0.0  # waited for batches, in the attempt
    away: float = 0.0  # evaluating and saving
    samples: int = 0
    steps: int = 0

    def figures(self, now: float, data: float, step: int, total_steps: int) -> dict[str, float]:
        """`data` seconds of waiting and `step` steps are those so far."""
        seconds = max(now - self.began - self.away, 1e-9)  # evaluations and saves left out
        a_step = (now - self.attempt) / max(1, step - self.first)  # with them
        return {
            "perf/step_s": seconds / self.steps,
            "perf/data_s": (data - self.data) / self.steps,
            "perf/samples_per_s": self.samples / seconds,
            "perf/eta_s": max(total_steps - step, 0) * a_step,
        }

    def restart(self, now: float, data: float) -> None:
        """A record has been made."""
        self.began, self.data = now, data
        self.away, self.samples, self.steps = 0.0, 0, 0
