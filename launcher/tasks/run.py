"""What a task may know of the run that it is trained in. Importing this imports no torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.config import parse_duration
from launcher.tasks.recorder import InWorker, Recorder

if TYPE_CHECKING:
    import torch


class Progress(NamedTuple):
    """Optimiser steps done, whole epochs done, training samples consumed."""

    step: int = 0
    epoch: int = 0
    samples: int = 0


class Run:
    """A task's `self.run`. Outside a run, as in a test, it is one of one process at its start.

    How long that would be nobody knows, and a task that divides by it must not get a number that is
    made up: a test gives its own, as `task.run = Run(total_steps=100, steps_per_epoch=10)`.
    """

    recorder: Recorder = Recorder()
    _unknown = "is not known outside a run: give the task one, as in " + (
        "task.run = launcher.tasks.run.Run(total_steps=100, steps_per_epoch=10)"
    )

    def __init__(
        self,
        total_steps: int = 0,
        steps_per_epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str = "cpu",
    ) -> None:
        """0 steps: not known. `rank` is this process's, of `world_size`."""
        self._total_steps, self._steps_per_epoch = total_steps, steps_per_epoch
        self.rank, self.world_size, self._device = rank, world_size, device

    @property
    def device(self) -> torch.device:
        """That of this rank, where batches and the model are."""
        import torch

        return torch.device(self._device)

    @property
    def total_steps(self) -> int:
        """Optimiser steps in TRAIN.DURATION."""
        return self._known("total_steps", self._total_steps)

    @property
    def steps_per_epoch(self) -> int:
        """Enormous where the training data set tells no length."""
        return self._known("steps_per_epoch", self._steps_per_epoch)

    @property
    def split(self) -> str:
        """What a batch is of: "train", or the name of the evaluation under way."""
        return self._now("split")

    @property
    def progress(self) -> Progress:
        """What is done, without the step under way. A copy."""
        return self._now("progress")

    @property
    def done(self) -> float:
        """The share of TRAIN.DURATION that is done, from 0 to 1."""
        return self._now("done")

    def _now(self, name: str) -> Any:
        return {"split": "train", "progress": Progress(), "done": 0.0}[name]

    def _known(self, name: str, value: int) -> int:
        if not value:
            raise RuntimeError(f"run.{name} {self._unknown}")
        return value


class RunInWorker(Run):
    """In a loader worker: what holds there too."""

    recorder = InWorker()

    def _now(self, name: str) -> Any:
        raise RuntimeError(
            f"run.{name} is not known in a loader worker, which fetches ahead of the training: use "
            "what the data set is asked for, or DATALOADER.NUM_WORKERS 0"
        )


class LiveRun(Run):
    """That of a run: `recorder` knows the rank and how far it is, `begin` tells how long it is."""

    _unknown = "is not known before the data sets are: ask for it in build_model, or later"

    def __init__(self, recorder: Any) -> None:
        """`recorder` is one of launcher/telemetry/recorder.py."""
        runtime = recorder.runtime
        super().__init__(0, 0, runtime.rank, runtime.world_size, str(runtime.device))
        self.recorder: Any = recorder
        self._pid = os.getpid()
        self._samples = 0  # in TRAIN.DURATION, where that is in epochs

    def begin(self, data: Any) -> None:
        """The data sets are there, and their plan: `data` is one of launcher/data/splits.py."""
        plan, self._total_steps = data.train_plan, data.total_steps
        self._steps_per_epoch = plan.steps_per_epoch
        duration = parse_duration(data.cfg.TRAIN.DURATION)
        if duration is not None and duration.unit == "ep":
            self._samples = data.total_steps // plan.steps_per_epoch * plan.samples_per_epoch

    def _now(self, name: str) -> Any:
        if os.getpid() != self._pid:
            return RunInWorker()._now(name)
        if name == "split":
            return self.recorder.split
        at = Progress(**self.recorder.progress.as_dict())
        if name == "progress":
            return at
        # In epochs by samples: a step that the gradient scaler skips takes its samples too.
        whole = self._samples or self._known("done", self._total_steps)
        return min(1.0, (at.samples if self._samples else at.step) / whole)

    def __reduce__(self) -> tuple[type[Run], tuple[Any, ...]]:
        # A task may be sent to a spawned loader worker with its collate.
        steps = self._total_steps, self._steps_per_epoch
        return RunInWorker, (*steps, self.rank, self.world_size, self._device)
