"""The training loop: one global batch after the other, and after each what is due."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from dataclasses import dataclass
from typing import Any

from launcher.checkpoint.saver import Saver
from launcher.checkpoint.state import TrainingState, random_state, set_random_state
from launcher.config import CfgNode, parse_duration
from launcher.data.splits import Data
from launcher.engine.evaluate import evaluate
from launcher.engine.optim import rates
from launcher.engine.schedule import Schedule
from launcher.engine.step import TrainStep
from launcher.errors import RunError
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Every
from launcher.telemetry.histograms import Histograms
from launcher.telemetry.rundir import RunDirectory
from launcher.telemetry.sinks import strict
from launcher.telemetry.system import versions
from launcher.telemetry.throughput import Eta, Throughput

logger = logging.getLogger(__name__)
NOTHING: frozenset[str] = frozenset()
STOP = frozenset({"stop"})


@dataclass
class StopWatch:
    """Where this rank's time since the last record went, in seconds."""

    started: float
    data: float = 0.0
    away: float = 0.0  # evaluating and saving
    samples: int = 0
    steps: int = 0

    def seconds(self, now: float) -> float:
        """Time in steps, evaluations and saves left out."""
        return max(now - self.started - self.away, 1e-9)

    def figures(self, now: float) -> dict[str, float]:
        seconds = self.seconds(now)
        return {
            "perf/step_s": seconds / self.steps,
            "perf/data_s": self.data / self.steps,
            "perf/samples_per_s": self.samples / seconds,
        }


class Loop:
    """Trains to TRAIN.DURATION. Every rank runs it and takes the same turns."""

    def __init__(
        self,
        cfg: CfgNode,
        task: Any,
        runtime: Runtime,
        directory: RunDirectory,
        data: Data,
        state: TrainingState,
        schedule: Schedule,
        saver: Saver | None,
    ) -> None:
        self.cfg, self.task, self.runtime, self.directory = cfg, task, runtime, directory
        self.data, self.state, self.schedule, self.saver = data, state, schedule, saver
        before_update = saver.before_update if saver is not None else None
        self.step = TrainStep(cfg, task, state, runtime, before_update)
        self.periods = {
            "record": Every(cfg.LOG.EVERY),
            "evaluate": Every(cfg.EVAL.EVERY),
            "checkpoint": Every(cfg.CHECKPOINT.EVERY),
        }
        period = cfg.LOG.HISTOGRAMS if cfg.LOG.TENSORBOARD else ""
        self.histograms = Histograms(period, state.model, state.recorder)
        self.step.observe = self.histograms.gradients
        self.throughput = Throughput(cfg, task, runtime.device, runtime.world_size)
        self.timed = [name for name, period in self.periods.items() if period.timed]
        self.clock = StopWatch(time.monotonic())
        self.advised, self.waited = False, 0.0
        self.metrics: dict[str, float] = {}  # of an evaluation at this very step
        self.recorded = self.evaluated = -1  # at which step

    def train(self) -> str | None:
        """One global batch after the other, and after each what is due, in this order: the record,
        the evaluation, the checkpoint.

        Returns None at the end of TRAIN.DURATION, else (on rank 0) why the run was stopped before.
        """
        cfg, plan, progress = self.cfg, self.data.train_plan, self.state.progress
        duration = parse_duration(cfg.TRAIN.DURATION)
        assert duration is not None  # the config check demands one
        if not cfg.EVAL.EVERY and cfg.CHECKPOINT.KEEP_BEST:
            logger.info("never evaluated: CHECKPOINT.METRIC %s is ignored", cfg.CHECKPOINT.METRIC)
        self._check_space()
        self.clock = StopWatch(time.monotonic())
        self.eta = Eta(self.schedule.total_steps, progress.step, self.clock.started)
        watch = self.runtime.watch
        finished = progress.reached(duration)
        if self.state.due and not self._make_up(finished):
            return self._stopped()
        batches = self.data.batches()
        while not finished:
            watch.enter("step")
            before, self.metrics = progress.copy(), {}
            batch = next(batches)
            self.schedule.apply(self.state.optimizer, progress.step)
            self.histograms.prepare(progress, batch.count, plan.samples_per_epoch)
            with self.throughput.step(sum(batch.sizes)):
                skipped, seen = self.step(batch, self._requests())
            progress.advance(batch.count, plan.samples_per_epoch, skipped)
            finished = progress.reached(duration)
            self.clock.steps += 1
            self.clock.samples += batch.count
            self.clock.data = self.data.waited - self.waited
            watch.started = True
            stopping = "stop" in seen
            if skipped and not finished and not stopping:
                continue  # no new step: nothing is due that was not due before
            if not skipped:
                self.histograms.show(progress.step)

            due = seen | {name for name, p in self.periods.items() if p.due(before, progress)}
            # A step stands once, also where the last batches were skipped by the scaler.
            if ("record" in due or finished) and self.recorded < progress.step:
                self.record()
            began = time.monotonic()
            best: bool | None = False
            evaluate_last = finished and cfg.EVAL.EVERY
            if ("evaluate" in due or evaluate_last) and self.evaluated < progress.step:
                # When asked to stop, the evaluation is left to the attempt that goes on.
                best = None if stopping else self.evaluate()
            if best is None or (stopping and not finished):
                self.state.due = sorted({"evaluate"} | due & {"checkpoint"}) if best is None else []
                self.save(last=True)
                return self._stopped()
            if "checkpoint" in due or best or finished:
                self.save(last=finished)
            self.clock.away += time.monotonic() - began
        return None

    def _make_up(self, finished: bool) -> bool:
        """Do what was due at the checkpoint's step when the attempt before this one was stopped;
        False where this one is asked to stop meanwhile."""
        best, due = self.evaluate(), self.state.due
        if best is None:
            return False
        self.state.due = []
        if best or finished or "checkpoint" in due:
            self.save(last=finished)
        return True

    def _stopped(self) -> str:
        """Why; known to rank 0."""
        # A collective, the last one: any rank may have been the one that was asked to.
        reasons = self.runtime.gather(self.runtime.watch.stop)
        for rank, reason in enumerate(reasons or []):
            if reason is not None:
                return reason if rank == 0 else f"{reason} (rank {rank})"
        return "asked to"

    def _check_space(self) -> None:
        """Warn where the disk has no room for the checkpoints that are kept, and one being written.

        Weights, their average, and as much again as the optimiser may keep for each weight.
        """
        if self.saver is None:
            return
        weights = sum(t.nbytes for t in self.state.model.state_dict().values())
        copies = 2 + (self.state.ema is not None) + (self.cfg.OPTIM.NAME == "adamw")
        kept = self.cfg.CHECKPOINT.KEEP_LAST + self.cfg.CHECKPOINT.KEEP_BEST
        needed = (kept + 1) * weights * copies
        free = shutil.disk_usage(self.directory.path).free
        if free < needed:
            logger.warning(
                "%.1f GiB are free in %s, and %d checkpoints with one being written need about "
                "%.1f GiB: free some, or lower CHECKPOINT.KEEP_LAST and KEEP_BEST",
                free / 2**30,
                self.directory.path,
                kept,
                needed / 2**30,
            )

    def _requests(self) -> frozenset[str]:
        """What this rank has to say, and all see after the step: that it was asked to stop; on rank
        0, what is due by its clock."""
        stop = NOTHING if self.runtime.watch.stop is None else STOP
        if not self.timed or not self.runtime.is_main:
            return stop
        return stop | {name for name in self.timed if self.periods[name].elapsed()}

    def record(self) -> None:
        """Write the means since the last record. A collective."""
        now = time.monotonic()
        self.recorded = self.state.progress.step
        extra = {**rates(self.state.optimizer), **self.clock.figures(now)}
        extra |= self.throughput.figures(extra["perf/samples_per_s"])
        extra |= self.eta.figures(self.recorded, now)
        if self.state.scaler.is_enabled():
            batches = self.data.train_plan.batches_in(self.state.progress.samples)
            extra["train/skipped_steps"] = batches - self.state.progress.step
        self.state.recorder.record(self.state.progress.as_dict(), extra, self.step.own.take)
        self._advise(now)
        self.clock, self.waited = StopWatch(time.monotonic()), self.data.waited

    def _advise(self, now: float) -> None:
        """One line, once an attempt, where over a fifth of the time is spent waiting for data."""
        seconds, steps = self.clock.seconds(now), self.clock.steps
        if self.advised or seconds < 1 or self.clock.data < 0.2 * seconds:
            return
        self.advised = True
        logger.warning(
            "training waits for data %.0f %% of its time (perf/data_s %.4f of perf/step_s %.4f; "
            "%s). `launcher tune-loader` finds better settings.",
            100 * self.clock.data / seconds,
            self.clock.data / steps,
            seconds / steps,
            self.data.size.reason,
        )

    def evaluate(self) -> bool | None:
        """Evaluate, with the averaged weights where there are, and say whether it is a new best;
        None where it was given up because a rank was asked to stop. A collective."""
        cfg, state = self.cfg, self.state
        # What an evaluation draws leaves the training's random state as it was: it may be left
        # out, done once more or given up, and the steps after it stay the same.
        before = random_state()
        model = state.model if state.ema is None else state.ema.module
        metrics = evaluate(
            cfg, self.task, model, self.data.evaluation(), self.data.val_plan, self.runtime
        )
        set_random_state(before)
        self.runtime.watch.enter("step")
        if metrics is None:
            return None
        self.evaluated = state.progress.step
        self.metrics = {f"val/{key}": value for key, value in metrics.items()}
        state.recorder.write(state.progress.as_dict(), self.metrics)
        if cfg.CHECKPOINT.KEEP_BEST and cfg.CHECKPOINT.METRIC not in self.metrics:
            raise RunError(
                f"CHECKPOINT.METRIC {cfg.CHECKPOINT.METRIC} is none of what the evaluation gave: "
                f"{', '.join(self.metrics)}. Set it to one of these, or CHECKPOINT.KEEP_BEST 0."
            )
        best = None
        if self.saver is not None:
            best = self.saver.store.is_best(self.metrics, self.saver.pending)
        # A collective: rank 0 alone sees the checkpoints.
        return self.runtime.broadcast(best)

    def save(self, last: bool = False) -> None:
        """Start to save this step boundary; the last save is waited for. A collective."""
        state = self.state
        self.runtime.watch.enter("save")
        try:
            self._save(state, last)
        finally:
            self.runtime.watch.enter("step")

    def _save(self, state: TrainingState, last: bool) -> None:
        captured = state.capture(self.runtime)
        if captured is None or self.saver is None:
            return
        if not state.recorder.flush():
            # A checkpoint says how long the files are up to it: it must not come before them.
            if last:
                raise RunError("no last checkpoint: the records before it could not be written")
            logger.warning("no checkpoint: the records before it could not be written")
            return
        position = state.progress.as_dict()
        config = self.cfg.dump()
        captured |= {
            "config": config,
            "dataset_length": self.data.train_plan.length,
            "stream": self.data.stream_state(state.progress.samples),
            "files": self.directory.positions(),
        }
        manifest = {
            **position,
            "world_size": self.runtime.world_size,
            "metrics": strict(self.metrics),
            "time": time.time(),
            "versions": versions(),
            "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        }
        self.saver.save(captured, manifest, changing=list(state.model.buffers()))
        if last and self.saver.wait() is not None:
            # Nothing comes after it that could be tried instead.
            self.saver.save(captured, manifest, changing=list(state.model.buffers()))
            if (error := self.saver.wait()) is not None:
                raise RunError(f"the last checkpoint could not be saved: {error}") from error
