"""A metric that a callback watches: whether it still gets better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from launcher.callbacks import Run
from launcher.config.checks import evaluates, recorded_as
from launcher.errors import RunError, UsageError
from launcher.log import get_logger

logger = get_logger(__name__)


class Watched:
    """What early_stopping and plateau have in common. A subclass says in `saw` what to do.

    `metric` is one of an evaluation (`val/...`), or of a record (`train/...`). All ranks see each
    value of it, so what `saw` does it does on all of them. `waited` is for how many evaluations or
    records the metric has not got better by more than `least_change` than the `best` before.
    """

    least_patience = 1

    def __init__(
        self, run: Run, metric: str, patience: int, mode: str, least_change: float
    ) -> None:
        """Raises UsageError for arguments that are wrong, or a metric that cannot come."""
        self.run, self.name = run, type(self).__name__
        self.require(mode in ("min", "max"), "mode", mode, "min or max")
        self.require(isinstance(metric, str) and metric, "metric", metric, "a recorded name")
        few = type(patience) is not int or patience < self.least_patience
        self.require(not few, "patience", patience, f"a whole number from {self.least_patience} on")
        self.require(is_number(least_change, 0), "least_change", least_change, "a number, not < 0")
        self.metric, self.patience, self.mode = metric, patience, mode
        self.least_change, self.sign = least_change, 1.0 if mode == "max" else -1.0
        self.of_records = metric.startswith("train/")
        self.what = "record" if self.of_records else "evaluation"
        self.best, self.waited, self.missed = -self.sign * math.inf, 0, False
        self._check_metric()

    def require(self, right: Any, argument: str, value: Any, needed: str) -> None:
        """Raise UsageError unless an argument is right."""
        if not right:
            raise UsageError(f"CALLBACKS: {self.name}: {argument} is {value!r}, not {needed}")

    def _check_metric(self) -> None:
        cfg, splits = self.run.cfg, list(self.run.cfg.EVAL.SPLITS)
        told = f"CALLBACKS: {self.name}: metric {self.metric}"
        split, slash, name = self.metric.partition("/")
        if split in ("perf", "system") or not slash:
            raise UsageError(
                f"{told} is none of an evaluation (val/...) or of the training (train/...)"
            )
        if self.of_records:
            return
        if not evaluates(cfg) or split.removesuffix("_raw") not in map(recorded_as, splits):
            raise UsageError(
                f"{told} never comes: EVAL.EVERY is {cfg.EVAL.EVERY!r}, EVAL.SPLITS {splits}. Set "
                "them, or watch train/loss."
            )
        names = getattr(self.run.task, "metrics", lambda: None)()
        if names is not None and name not in names:
            known = ", ".join(f"{split}/{n}" for n in names)
            raise UsageError(f"{told} is not among what the task returns: {known}")

    def saw(self, value: float) -> str | None:
        """A value has come, and `best` and `waited` are up to date; a request, or None."""
        raise NotImplementedError

    def on_evaluation(self, metrics: Mapping[str, float]) -> str | None:
        if self.of_records:
            return None
        if self.metric not in metrics:
            raise RunError(
                f"CALLBACKS: {self.name}: metric {self.metric} is none of what the evaluation "
                f"gave: {', '.join(metrics)}"
            )
        return self._take(metrics[self.metric])

    def on_record(self, record: Mapping[str, Any] | None) -> str | None:
        if not self.of_records:
            return None
        if record is not None and self.metric not in record and not self.missed:
            self.missed = True
            given = ", ".join(key for key in record if key.startswith("train/"))
            logger.warning(
                "%s waits for %s, which this record does not have: it has %s",
                *(self.name, self.metric, given),
            )
        # A collective, once a record: rank 0 alone has it.
        value = self.run.runtime.on_main(lambda: (record or {}).get(self.metric))
        return None if value is None else self._take(value)

    def _take(self, value: float) -> str | None:
        better = self.sign * value > self.sign * self.best + self.least_change
        self.best, self.waited = (value, 0) if better else (self.best, self.waited + 1)
        return self.saw(value)

    def state_dict(self) -> dict[str, Any]:
        watched = {"metric": self.metric, "mode": self.mode}
        return {**watched, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if (state["metric"], state["mode"]) == (self.metric, self.mode):  # else another's best
            self.best, self.waited = state["best"], state["waited"]


def is_number(value: Any, least: float = -math.inf) -> bool:
    """Whether it is a finite number, not below `least`."""
    kind = isinstance(value, (int, float)) and not isinstance(value, bool)
    return kind and math.isfinite(value) and value >= least
