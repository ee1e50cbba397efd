"""Advice, once an attempt, where training waits for its data."""

from __future__ import annotations

from typing import Any

from launcher.callbacks import Run
from launcher.log import get_logger

logger = get_logger(__name__)
# Share of the time since the last record, and the least such time in seconds.
WAITS, LEAST_S = 0.2, 1.0


class DataAdvice:
    def __init__(self, run: Run) -> None:
        self.run, self.told, self.step = run, False, 0

    def on_start(self) -> None:
        self.step = self.run.progress.step

    def on_record(self, record: dict[str, Any] | None) -> None:
        if record is None or self.told:
            return
        steps, self.step = self.run.progress.step - self.step, self.run.progress.step
        data, whole = record["perf/data_s"], record["perf/step_s"]
        if data < WAITS * whole or whole * steps < LEAST_S:
            return
        self.told = True
        logger.warning(
            "training waits for data %.0f %% of its time (perf/data_s %.4f of perf/step_s %.4f; "
            "%s). `launcher tune-loader` finds better settings.",
            *(
                100 * data / whole,
                data,
                whole,
                self.run.data.size.reason,
            ),
        )
