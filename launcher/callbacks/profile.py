"""Traces of single steps by torch.profiler, and where a step's time goes: profile/, by
DEBUG.PROFILE.

torch.profiler slows the step that it traces. So the table beside a trace is of the step before it,
which is measured by marks alone.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from launcher.callbacks import Run
from launcher.callbacks.step_parts import PARTS, StepParts
from launcher.log import get_logger
from launcher.runtime.progress import Every

logger = get_logger(__name__)


class Profile:
    """The step that ends each period is traced, at most DEBUG.PROFILE_STEPS times an attempt, to
    profile/step_<N>/rank<K>.pt.trace.json: the name that TensorBoard's plugin looks for. The table
    is rank<K>.txt beside it."""

    def __init__(self, run: Run) -> None:
        self.run, self.every = run, Every(run.cfg.DEBUG.PROFILE)
        self.left = run.cfg.DEBUG.PROFILE_STEPS
        self.parts: StepParts | None = None  # of the step under way, or just over, if measured
        self.before: StepParts | None = None  # of one that was measured and not traced
        self.profiler: profile | None = None
        self.tracing = ExitStack()
        self.traced = False  # whether the step of `parts` was

    def before_step(self, samples: int) -> None:
        self._settle()
        if self.left > 0 and self.run.is_due(self.every):
            self._start()
            self.parts = StepParts(self.run)
        elif self.left > 0 and self.run.is_due(self.every, ahead=1):
            self.parts = StepParts(self.run)

    def on_backward(self, loss: torch.Tensor) -> None:
        if self.parts is not None:
            self.parts.on_backward(loss)

    def on_gradients(self) -> None:
        if self.parts is not None:
            self.parts.mark("optimiser")

    def on_step(self) -> None:
        if self.parts is None:
            return
        self.parts.end()
        if self.profiler is not None:
            self._export(self._stop())
            self.left, self.traced = self.left - 1, True
        self.parts.mark("record")

    def on_record(self, record: Any) -> None:
        if self.parts is not None:
            self.parts.end()

    def on_evaluation(self, metrics: Any) -> None:
        self._settle()

    def on_checkpoint(self) -> None:
        self._settle()

    def on_end(self) -> None:
        self._settle()

    def _settle(self) -> None:
        """What was measured is over."""
        parts, traced = self.parts, self.traced
        self.parts, self.traced = None, False
        if self.profiler is not None:  # the gradient scaler has skipped the step
            self._stop()
        if parts is None or not parts.ended:
            if parts is not None:
                parts.release()
        elif not traced:
            self.before = parts
        else:
            before, self.before = self.before, None
            plain = before if before is not None and before.step == parts.step - 1 else None
            self._write(table(plain or parts, parts, self.run.runtime.rank), parts.step)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.run.runtime.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities, record_shapes=True, with_stack=True)
        self.profiler.start()
        # What TensorBoard's plugin goes by to tell steps apart.
        step = self.run.progress.step + 1
        self.tracing.enter_context(record_function(f"ProfilerStep#{step}"))

    def _stop(self) -> profile:
        assert self.profiler is not None
        profiler, self.profiler = self.profiler, None
        self.tracing.close()
        profiler.stop()  # waits for the device: in a traced step alone
        return profiler

    def _export(self, profiler: profile) -> None:
        path = self._path(self.run.progress.step, ".pt.trace.json")
        half = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(half))
            half.replace(path)
            logger.info("traced step %d: %s", self.run.progress.step, path)
        except (OSError, RuntimeError) as error:  # a full disk, say
            logger.warning("no trace of step %d: %s", self.run.progress.step, error)

    def _write(self, text: str, step: int) -> None:
        logger.info("%s", text)  # on the console from rank 0 alone
        path = self._path(step, ".txt")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            logger.warning("%s could not be written: %s", path, error)

    def _path(self, step: int, end: str) -> Path:
        return self.run.directory / "profile" / f"step_{step}" / f"rank{self.run.runtime.rank}{end}"


def table(measured: StepParts, traced: StepParts, rank: int) -> str:
    """Where the time of a step went, in words and numbers."""
    found = measured.milliseconds()
    whole = sum(found.values())
    how = "slowed by its trace: no step before it was measured without one"
    if measured is not traced:
        how = f"not traced; the trace is of step {traced.step}"
    lines = [f"step {measured.step} of rank {rank}: {whole:.3f} ms ({how})"]
    for part, words in PARTS.items():
        share = 100 * found[part] / max(whole, 1e-9)
        lines.append(f"  {words:<18}{found[part]:>12.3f} ms{share:>7.1f} %")
    if measured is not traced and (record := traced.milliseconds()["record"]):
        lines.append(f"  the record of step {traced.step} took {record:.3f} ms more")
    return "\n".join(lines)
