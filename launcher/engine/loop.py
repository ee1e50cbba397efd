"""The training loop: one global batch after the other, and after each what is due."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from launcher.checkpoint.saver import Saver
from launcher.checkpoint.state import TrainingState
from launcher.config.checks import evaluates
from launcher.edges.generators import random_state, set_random_state
from launcher.edges.model import evaluated_model
from launcher.edges.optimizer import evaluated, rates
from launcher.engine.evaluate import Evaluation
from launcher.engine.step import TrainStep
from launcher.engine.timing import Timing
from launcher.errors import RunError
from launcher.guard.guard import Guard
from launcher.log import get_logger
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Every

logger = get_logger(__name__)


class Loop:
    """Trains to TRAIN.DURATION. Every rank runs it and takes the same turns."""

    def __init__(
        self,
        runtime: Runtime,
        guard: Guard,
        state: TrainingState,
        step: TrainStep,
        evaluation: Evaluation,
        saver: Saver | None,
    ) -> None:
        self.cfg, self.runtime, self.guard, self.state = state.cfg, runtime, guard, state
        self.step, self.evaluation, self.saver = step, evaluation, saver
        self.data, self.callbacks, self.progress = state.data, state.callbacks, state.progress
        self.periods = {
            "record": Every(state.cfg.LOG.EVERY),
            "evaluate": Every(state.cfg.EVAL.EVERY),
            "checkpoint": Every(state.cfg.CHECKPOINT.EVERY),
        }
        self.timed = [name for name, period in self.periods.items() if period.timed]
        self.evaluates = evaluates(self.cfg)
        self.raw = self.cfg.EVAL.RAW and state.averages
        if self.cfg.EVAL.RAW and not self.raw:
            logger.warning("EVAL.RAW: no weights are averaged, so there are none beside them")
        now = time.monotonic()
        self.timing = Timing(now, self.progress.step, now)
        # Of an evaluation at this very step.
        self.metrics: dict[str, float] = {}
        self.best = False
        self.untried = True  # nothing is evaluated yet in this attempt

    def train(self) -> str | None:
        """One global batch after the other, and after each what is due, in this order: the record,
        the evaluation, the checkpoint.

        Returns None where the run is complete, else (on rank 0) why it was stopped before.
        """
        cfg, progress, plan = self.cfg, self.progress, self.data.train_plan
        if not self.evaluates and cfg.CHECKPOINT.KEEP_BEST:
            logger.info("never evaluated: CHECKPOINT.METRIC %s is ignored", cfg.CHECKPOINT.METRIC)
        self.callbacks.call("on_start")
        finished = self.state.is_finished()
        if self.evaluates and cfg.EVAL.AT_START and progress.samples == 0:
            self.state.due = self.state.due or ["evaluate"]
        if self.state.due and not self._make_up(finished):
            return self._why_stopped()
        due: set[str] = set()  # also at a step that the scaler skipped
        batches = self.data.batches()
        while not finished:
            self.guard.enter("step")
            batch = next(batches)
            before = progress.copy()
            requests = self._requests()
            while (done := self.step(batch, requests)) is None:
                assert self.step.fitting is not None
                batches = self.step.fitting.again()
                batch = next(batches)
            skipped, seen = done
            progress.advance(batch.count, plan.samples_per_epoch, skipped)
            self.timing.steps += 1
            self.timing.samples += batch.count
            if "nonfinite" in seen:
                self.callbacks.call("on_nonfinite", len(self.step.pending))
            if "finish" in seen:
                self.state.finished = self._why(self.callbacks.reasons.get("finish"))
            finished = self.state.is_finished()
            stopping = "stop" in seen
            due |= seen | {name for name, p in self.periods.items() if p.due(before, progress)}
            if skipped and not finished and not stopping:
                continue  # no new step; what is due with an epoch's end waits for the next one
            if not skipped:
                self.metrics, self.best = {}, False
                self.callbacks.call("on_step")
            # A step stands once, also where the last batches were skipped by the scaler.
            if ("record" in due or finished) and self.state.recorded < progress.step:
                self.record()
            began = time.monotonic()
            put_off, evaluate = False, "evaluate" in due or (finished and self.evaluates)
            if evaluate and cfg.EVAL.SPLITS and self.state.evaluated < progress.step:
                # When asked to stop, the evaluation is left to the attempt that goes on.
                put_off = stopping or not self.evaluate()
            if put_off or (stopping and not finished):
                left = ["checkpoint", "evaluate"] if "checkpoint" in due else ["evaluate"]
                self.state.due = left if put_off else []
                self.save(last=True)
                return self._why_stopped()
            if "checkpoint" in due or self.best or finished:
                self.save(last=finished)
            due = set()
            self.timing.away += time.monotonic() - began
        self.guard.enter("save")  # a rank may take long alone: to export the model, say
        self.callbacks.call("on_end")
        return None

    def _make_up(self, finished: bool) -> bool:
        """Do what was due at the checkpoint's step when the attempt before this one was stopped;
        False where this one is asked to stop meanwhile."""
        if self.state.evaluated < self.progress.step and not self.evaluate():
            return False
        due, self.state.due = self.state.due, []
        if self.best or finished or "checkpoint" in due:
            self.save(last=finished)
        return True

    def _requests(self) -> frozenset[str]:
        """What this rank has to say, and all see after the step: that it was asked to stop, what
        callbacks ask for; on rank 0, what is due by its clock."""
        asked = self.callbacks.take() if self.callbacks.asked else frozenset()
        if self.guard.stop is not None:
            asked |= {"stop"}
        if self.timed and self.runtime.is_main:
            asked |= {name for name in self.timed if self.periods[name].elapsed()}
        return asked

    def _why(self, ours: str | None) -> str:
        """The reason of the first rank that has one; known to rank 0."""
        # A collective, in a run's last step: any rank may have been the one that asked.
        for rank, reason in enumerate(self.runtime.gather(ours) or []):
            if reason is not None:
                return reason if rank == 0 else f"{reason} (rank {rank})"
        return "another rank"

    def _why_stopped(self) -> str:
        return self._why(self.guard.stop or self.callbacks.reasons.get("stop"))

    def record(self) -> None:
        """Write the means since the last record. A collective."""
        state, step = self.state, self.progress.step
        state.recorded = step
        # The collective, and the one place where training waits for the device to read values.
        parts = state.recorder.gather(self.callbacks.local_figures())
        record = None
        if parts is not None:
            means, ranks = parts
            now, total = time.monotonic(), self.data.total_steps
            timing = self.timing.figures(now, self.data.waited, step, total)
            record = {**self.progress.as_dict(), **means, **rates(state.optimizers), **timing}
            if any(scaler.is_enabled() for scaler in state.scalers.values()):
                batches = self.data.train_plan.batches_in(self.progress.samples)
                record["train/skipped_steps"] = batches - self.progress.step
            record |= self.callbacks.figures(record, ranks)
            state.recorder.write(record)
        self.callbacks.call("on_record", record)
        self.timing.restart(time.monotonic(), self.data.waited)

    def evaluate(self) -> bool:
        """Evaluate, with the averaged weights where there are; False where it was given up because
        a rank was asked to stop. A collective."""
        cfg, state = self.cfg, self.state
        # What an evaluation draws leaves the training's random state as it was: it may be left
        # out, done once more or given up, and the steps after it stay the same.
        before = random_state()
        # A collective, in an attempt's first evaluation, which is the likeliest to fail.
        captured = self._capture() if self.untried else None
        try:
            metrics = self._metrics()
        except BaseException:  # a task that exits as well
            if captured is not None:
                self._keep(captured)
            raise
        set_random_state(before)
        self.untried = False
        self.guard.enter("step")
        if metrics is None:
            return False
        state.evaluated, self.metrics = self.progress.step, metrics
        state.recorder.write(metrics)
        if cfg.CHECKPOINT.KEEP_BEST and cfg.CHECKPOINT.METRIC not in metrics:
            raise RunError(
                f"CHECKPOINT.METRIC {cfg.CHECKPOINT.METRIC} is none of what the evaluation gave: "
                f"{', '.join(metrics)}. Set it to one of these, or CHECKPOINT.KEEP_BEST 0."
            )
        self.callbacks.call("on_evaluation", metrics)
        best = self.saver is not None and self.saver.store.is_best(metrics, self.saver.pending)
        self.best = self.runtime.broadcast(best)  # a collective: rank 0 alone sees the checkpoints
        return True

    def _metrics(self) -> dict[str, float] | None:
        """Of the weights that are evaluated, and with EVAL.RAW of the raw ones beside them."""
        state, keys, optimizers = self.state, self.cfg.EVAL, self.state.optimizers
        with evaluated(optimizers):
            model = evaluated_model(state.model, state.ema)
            metrics = self.evaluation(model, keys.SPLITS, show=True)
        if metrics is None or not self.raw:
            return metrics
        raw = self.evaluation(state.model, keys.SPLITS, "_raw")
        return None if raw is None else metrics | raw

    def _capture(self) -> dict[str, Any] | None:
        self.state.agreed = self.step.agreement.on_their_way()
        for late, names in enumerate(reversed(self.state.agreed)):
            if "nonfinite" in names:  # nothing is saved after it
                self.callbacks.call("on_nonfinite", late)
        return self.state.capture(self.runtime)

    def _keep(self, captured: dict[str, Any]) -> None:
        """Save what was trained up to an evaluation that has failed: a mistake in it costs nothing.
        On rank 0 alone, for the other ranks may be gone."""
        self.guard.enter("save")
        if self.saver is not None and self.state.recorder.writer.flush():
            files = self.state.directory.positions()
            captured |= {"files": files, "due": ["checkpoint", "evaluate"]}
            with contextlib.suppress(RunError):  # what the evaluation failed with is told
                self.saver.save(captured, self.state.manifest(self.runtime.world_size, {}), True)

    def save(self, last: bool = False) -> None:
        """Start to save this step boundary; the last save is waited for. A collective."""
        self.callbacks.call("on_checkpoint")
        state = self.state
        self.guard.enter("save")  # what rank 0 does alone: it may take long
        # A checkpoint says how long the files are up to it: the records must be in them, and nobody
        # records anything until `capture` has taken their lengths.
        written = state.recorder.writer.flush()
        self.guard.enter("step")  # what ranks do together: one that is lost is found out as in one
        captured = self._capture()
        self.guard.enter("save")
        if captured is not None and self.saver is not None:
            if written:
                manifest = state.manifest(self.runtime.world_size, self.metrics)
                self.saver.save(captured, manifest, last)
            elif last:
                raise RunError("no last checkpoint: the records before it could not be written")
            else:
                logger.warning("no checkpoint: the records before it could not be written")
        self.guard.enter("step")
