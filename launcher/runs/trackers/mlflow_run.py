"""A run in MLflow; where that is, MLflow's own variables say (MLFLOW_TRACKING_URI, ...)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlflow import MlflowClient, get_tracking_uri
from mlflow.entities import Metric, Param, RunTag
from mlflow.utils.uri import is_local_uri

from launcher.runs.trackers import Memory, Published, Record, Tracker

# Most of each that one request takes.
PARAMS, METRICS = 100, 1000
STATES = {"completed": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "lost": "KILLED"}
KEY = "launcher.run"


class MLflowRun(Tracker):
    """Config keys are parameters, a record's values metrics at its step and time."""

    def open(self, run: Published, memory: Memory, remember: Callable[[], None]) -> bool:
        self.client, self.memory = MlflowClient(), memory
        experiment = self.client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment else None
        number = number or self.client.create_experiment(run.project)
        found = [
            one.info.run_id
            for one in self.client.search_runs([number], f"tags.`{KEY}` = '{run.key}'")
        ]
        if found and memory.get("open") and is_local_uri(get_tracking_uri()):
            # MLflow's store of plain files: one may end within a line where a call was killed, or
            # the disk was full.
            self.client.delete_run(found.pop())
        known = bool(found)
        if not known:
            began, tags = round(run.began * 1000), {KEY: run.key}
            found = [self.client.create_run(number, began, tags, run.name).info.run_id]
        memory["open"] = True
        remember()
        self.run_id, self.there = found[0], dict[str, set[int]]()
        self.client.update_run(self.run_id, status="RUNNING")  # an end may have been told before
        return known

    def configure(self, run: Published) -> list[str]:
        values = {key: str(value) for key, value in run.config.items()}
        before = self.client.get_run(self.run_id).data.params
        new = [Param(key, value) for key, value in values.items() if key not in before]
        for some in _parts(new, PARAMS):
            self.client.log_batch(self.run_id, params=some)
        # MLflow cuts a long value off.
        changed = [k for k, v in values.items() if k in before and not v.startswith(before[k])]
        changed += [k for k, v in values.items() if before.get(k) == "" and v]
        for some in _parts([RunTag(f"changed.{key}", values[key]) for key in changed], PARAMS):
            self.client.log_batch(self.run_id, tags=some)
        return [
            f"{key} has changed, but MLflow's parameters never do: it is the tag changed.{key}"
            for key in changed
        ]

    def send(self, first: int, records: Sequence[Record]) -> None:
        metrics = []
        for record in records:
            step, at = record["step"], round(record["time"] * 1000)
            for key, value in record.items():
                if key not in ("step", "time") and step not in self._steps(key):
                    metrics.append(Metric(key, value, at, step))
                    self._steps(key).add(step)
        for some in _parts(metrics, METRICS):
            self.client.log_batch(self.run_id, metrics=some)

    def _steps(self, key: str) -> set[int]:
        """Those at which MLflow has a metric: not every store refuses one that comes twice."""
        if key not in self.there:
            history = self.client.get_metric_history(self.run_id, key)
            self.there[key] = {metric.step for metric in history}
        return self.there[key]

    def finish(self, state: str, reason: str, at: float) -> None:
        self.memory.pop("open")
        if state not in STATES:
            return
        for name, value in (("launcher.state", state), ("launcher.reason", reason)):
            self.client.set_tag(self.run_id, name, value)
        self.client.set_terminated(self.run_id, STATES[state], end_time=round(at * 1000))


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
