"""`digest`: a whole number over all bits of the weights and buffers, to tell runs apart at once."""

from __future__ import annotations

from typing import Any

from launcher.callbacks import Run
from launcher.edges.digest import Digest
from launcher.log import get_logger
from launcher.runtime.progress import Every

logger = get_logger(__name__)


class Digests:
    """Records the digest of rank 0's model before the first step, after each evaluation, after the
    steps of CHECKPOINT.EVERY and LOG.DIGEST (in steps or epochs), and after the last: at each once,
    in a record of its own. Not for a checkpoint that a stop or a clock has asked for, which a run
    that nobody interrupts does not have; each checkpoint holds its own, and a resume compares.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.digest = run, Digest(run.model)
        periods = map(Every, (run.cfg.LOG.DIGEST, run.cfg.CHECKPOINT.EVERY))
        self.periods = [period for period in periods if period.duration and not period.timed]
        self.before = run.progress.copy()  # at the step before
        self.recorded = -1  # the last step that it was recorded at
        self.saved: dict[str, int] = {}  # of the checkpoint that the run goes on from

    def on_start(self) -> None:
        progress = self.run.progress
        self.before = progress.copy()
        if self.saved.get("step") == progress.step:
            now = int(self.digest())  # waits for the device, once an attempt
            if now != self.saved["digest"]:
                logger.warning(
                    "the weights and buffers loaded are not those that were saved at step %d: their"
                    " digest is %d, not %d. The run cannot go on exactly. Does the model, or its "
                    "load_state_dict, change what is loaded?",
                    *(progress.step, now, self.saved["digest"]),
                )
        if progress.samples == 0 and self.recorded < 0:
            self._record()

    def on_step(self) -> None:
        before, now = self.before, self.run.progress
        due = now.step == self.run.data.total_steps
        for period in self.periods:
            due |= period.due(before, now)
        before.step, before.epoch = now.step, now.epoch
        if due:
            self._record()

    def on_evaluation(self, metrics: dict[str, float]) -> None:
        self._record()

    def _record(self) -> None:
        step = self.run.progress.step
        if self.recorded < step:
            self.recorded = step
            # Waits for the device: the number goes into a record.
            self.run.recorder.write({"digest": int(self.digest())})

    def state_dict(self) -> dict[str, Any]:
        # Waits for the device, as the saving of the numbers themselves does.
        now = {"step": self.run.progress.step, "digest": int(self.digest())}
        return {"recorded": self.recorded, "saved": now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recorded, self.saved = state["recorded"], state["saved"]
