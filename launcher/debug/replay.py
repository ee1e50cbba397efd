"""A step of a run once more, on as many ranks, with the proof that it is the same step."""

from __future__ import annotations

import contextlib
import json
import pdb
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launcher.callbacks import Run
from launcher.debug.plan import ReplayPlan
from launcher.debug.stats import Stats
from launcher.debug.trace import Trace
from launcher.runs.difference import FREE
from launcher.telemetry.media import Media
from launcher.telemetry.rundir import POSITION
from launcher.telemetry.sinks import Record, Sink, strict


class Replayed(Exception):
    """The step is done; raised on all ranks alike, before the next one."""


class Comparison(Sink):
    """Compares what is recorded with what a run has recorded, value by value."""

    name = "the comparison"

    def __init__(self, theirs: dict[int, dict[str, Any]], timed: bool) -> None:
        """`timed`: the run's periods follow a clock, so that its means are over other steps."""
        self.theirs, self.timed = theirs, timed
        self.same = 0  # values that are equal
        self.proved: list[int] = []  # steps at which the digests are
        self.differing: list[tuple[int, str, Any, Any]] = []  # step, key, then, now

    def write(self, items: Sequence[Record | Media]) -> None:
        for item in items:
            if isinstance(item, dict):
                self._compare(json.loads(json.dumps(strict(item), default=float)))

    def _compare(self, record: Record) -> None:
        step = record["step"]
        then = self.theirs.get(step, {})
        for key, now in record.items():
            skipped = key in POSITION or key.startswith(FREE) or key == "nonfinite"
            if skipped or key not in then or (self.timed and key.startswith("train/")):
                continue
            if now == then[key]:
                self.same += 1
                if key == "digest":
                    self.proved.append(step)
            else:
                self.differing.append((step, key, then[key], now))

    def first_digest(self) -> int | None:
        """The first step at which the weights are others."""
        return min((step for step, key, _, _ in self.differing if key == "digest"), default=None)


class Replay:
    """A callback: looks into one step on one rank, and ends the run after it.

    `how` is "" (compare alone), "pdb", "stats", "profile" or "anomaly"; or "trace", on all ranks
    and in all steps.
    """

    def __init__(
        self,
        run: Run,
        plan: ReplayPlan,
        comparison: Comparison,
        rank: int,
        how: str,
        out: Path,
        inside: contextlib.ExitStack,
    ) -> None:
        """`inside` is the step, while it is looked into; for the caller to close where it fails."""
        self.run, self.plan, self.comparison = run, plan, comparison
        self.rank = rank
        here = run.runtime.rank == rank or plan.world_size < plan.ranks
        self.how = how if here or how == "trace" else ""
        self.out, self.trace = out, None
        if how == "trace":
            self.trace = Trace(run, Path(f"{out}.rank{run.runtime.rank}"), self._indices)
        self.inside = inside

    def sink(self) -> Sink:
        return self.comparison

    def before_step(self, samples: int) -> None:
        self.inside.close()  # of one that the gradient scaler skipped
        step = self.run.progress.step
        if step >= self.plan.step:
            raise Replayed
        if self.trace is not None:
            self.inside.enter_context(self.trace.step())
        elif step == self.plan.step - 1 and self.how:
            getattr(self, f"_{self.how}")()

    def on_step(self) -> None:
        self.inside.close()

    def _pdb(self) -> None:
        task, of = self.run.task, type(self.run.task).train_step
        samples, taken, mine = self._indices(), Counter[str](), self._of_rank()

        def train_step(model: Any, batch: Any, *phase: str) -> Any:
            at = self.run.recorder.phase  # each goes through the same micro-batches
            number = taken[at]
            taken[at] += 1
            if number not in mine:
                return of(task, model, batch, *phase)
            return look(task, of, model, batch, samples[number], self.run.optimizers[at], *phase)

        task.train_step = train_step
        self.inside.callback(lambda: task.__dict__.pop("train_step", None))

    def _indices(self) -> list[list[int]]:
        """The samples of each of this rank's micro-batches, as indices of the data set (positions
        in the stream of an iterable one)."""
        data, (epoch, k) = self.run.data, self._batch()
        cuts = data.train_plan.micro_batches(k, self.run.runtime.rank)
        return [data.order(epoch, np.arange(*cut)).tolist() for cut in cuts]

    def _batch(self) -> tuple[int, int]:
        """The epoch, and the number of the global batch in it."""
        plan = self.run.data.train_plan
        return divmod(plan.batches_in(self.run.progress.samples), plan.steps_per_epoch)

    def _of_rank(self) -> range:
        """Which of these micro-batches were those of the rank that is looked at."""
        if self.plan.world_size == self.plan.ranks:
            return range(len(self._indices()))
        plan = replace(self.run.data.train_plan, world_size=self.plan.ranks)
        counts = [len(plan.micro_batches(self._batch()[1], r)) for r in range(self.rank + 1)]
        return range(sum(counts[:-1]), sum(counts))

    def _stats(self) -> None:
        stats = Stats(self.run.model)
        self.inside.callback(lambda: print(stats.table(), flush=True))
        self.inside.enter_context(stats)

    def _profile(self) -> None:
        cuda = torch.cuda.is_available() and self.run.runtime.device.type == "cuda"
        kinds = torch.profiler.ProfilerActivity
        profiler = torch.profiler.profile(
            activities=[kinds.CPU, *([kinds.CUDA] if cuda else [])], record_shapes=True
        )
        trace = self.out / f"step_{self.plan.step}.rank{self.run.runtime.rank}.pt.trace.json"

        def told() -> None:
            profiler.export_chrome_trace(str(trace))
            by = "self_device_time_total" if cuda else "self_cpu_time_total"
            print(profiler.key_averages().table(sort_by=by, row_limit=20))
            print(f"the trace is in {trace}: open it in chrome://tracing or ui.perfetto.dev")

        self.inside.callback(told)
        self.inside.enter_context(profiler)

    def _anomaly(self) -> None:
        self.inside.enter_context(torch.autograd.set_detect_anomaly(True))


def look(
    task: Any, train_step: Any, model: Any, batch: Any, indices: Any, optimizer: Any, *phase: str
) -> Any:
    """The step to look into: `model`, `batch`, `indices` and `optimizer` are at hand; `s` goes into
    the task's train_step, `c` goes on."""
    pdb.set_trace()
    return train_step(task, model, batch, *phase)
