"""What a task may record beside what its steps return. Imports no torch."""

from __future__ import annotations

from typing import Any


class Recorder:
    """A task's `self.recorder`, at any pace, in train_step, eval_step and summarize.

    This one records nothing: it stands in tests. A run gives the task one
    that records before its `__init__`. Names get `train/` or `val/` in front, and no call waits for
    the device or a file.
    """

    @property
    def step(self) -> int:
        """The step that what is recorded now belongs to: the one under way, or the one after which
        the evaluation runs."""
        return 0

    def scalar(self, name: str, value: Any, weight: float = 1.0) -> None:
        """A number for the next record: the mean, by weight, of what all ranks gave since the last
        one. In an evaluation: the mean over the split."""

    def image(self, name: str, image: Any) -> None:
        """A picture of shape (H, W), (C, H, W) or (N, C, H, W) with 1, 3 or 4 channels: uint8, or
        floating-point from 0 to 1. From rank 0; the first of a name and step counts."""

    def histogram(self, name: str, values: Any) -> None:
        """How the values of a tensor are spread. From rank 0."""

    def text(self, name: str, text: str) -> None:
        """Markdown. From rank 0."""

    def figure(self, name: str, figure: Any) -> None:
        """A matplotlib figure, drawn at once and shown as an image. From rank 0."""


class InWorker(Recorder):
    """In a loader worker, which fetches ahead of the training. It records nothing."""

    @property
    def step(self) -> int:
        raise RuntimeError(
            "recorder.step is not known in a loader worker, which fetches ahead of the training: "
            "use what the data set is asked for, or DATALOADER.NUM_WORKERS 0"
        )
