"""A task's recorder in a run: scalars go into the next record, everything else to TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.tasks.recorder import TaskRecorder
from launcher.telemetry.media import Media, OnHost, picture, spread
from launcher.telemetry.recorder import Recorder

# A scalar of an evaluation: name, value, weight.
Note = tuple[str, Any, Any]


class RunRecorder(TaskRecorder):
    """Scalars are taken on every rank and put together with those that steps return; the rest is
    taken on rank 0 and does nothing elsewhere. In a loader worker all of it does nothing."""

    def __init__(self, recorder: Recorder, progress: Progress, runtime: Runtime) -> None:
        self.recorder, self.progress, self.runtime = recorder, progress, runtime
        self.pid = os.getpid()
        self.split = "train"
        # Of an evaluation: scalars since `take`, and what is shown when it is complete.
        self.notes: list[Note] = []
        self.held: list[Media] = []
        self.shown: set[str] = set()
        self.shown_at = -1

    def __reduce__(self) -> tuple[type[TaskRecorder], tuple[()]]:
        # A task may be sent to a spawned loader worker with its collate.
        return TaskRecorder, ()

    @property
    def step(self) -> int:
        return self.progress.step + (self.split == "train")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While it lasts, what the task records belongs to the evaluation."""
        self.split, self.notes, self.held = "val", [], []
        try:
            yield
        finally:
            self.split = "train"

    def take(self) -> list[Note]:
        """The evaluation's scalars since the last call."""
        taken, self.notes = self.notes, []
        return taken

    def show_held(self) -> None:
        """The evaluation is complete: one that is given up is done once more, and shown then."""
        for media in self.held:
            self.recorder.show(media)

    def scalar(self, name: str, value: Any, weight: float = 1.0) -> None:
        if os.getpid() != self.pid:
            return
        if isinstance(value, torch.Tensor):
            if value.dim() != 0:
                raise ValueError(f"{name!r} is no scalar: its shape is {tuple(value.shape)}")
            value = value.detach()
        if self.split == "val":
            self.notes.append((name, value, weight))
            return
        device = self.runtime.device
        if not isinstance(value, torch.Tensor):
            # A fill on the device; a copy to it would wait.
            value = torch.full((), float(value), dtype=torch.float64, device=device)
        self.recorder.add({name: value.to(device, non_blocking=True)}, weight)

    def image(self, name: str, image: Any) -> None:
        if tag := self._new(name):
            self._show("image", tag, OnHost(picture(image)))

    def histogram(self, name: str, values: Any) -> None:
        values = torch.as_tensor(values)
        if values.numel() and (tag := self._new(name)):
            self._show("histogram", tag, OnHost(spread(values)[None]))

    def text(self, name: str, text: str) -> None:
        if tag := self._new(name):
            self._show("text", tag, text)

    def figure(self, name: str, figure: Any) -> None:
        if tag := self._new(name):
            from matplotlib.backends.backend_agg import FigureCanvasAgg  # whose figure it is

            shown_in = figure.canvas
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            pixels = torch.from_numpy(np.array(canvas.buffer_rgba()))[..., :3]
            figure.set_canvas(shown_in)
            self._show("image", tag, OnHost(picture(pixels.permute(2, 0, 1))))

    def _new(self, name: str) -> str:
        """The tag, or "" where there is nothing to do: another rank or process, no sink, or the
        name was shown at this step (by another micro-batch, or a step that the scaler skipped)."""
        if self.recorder.sink is None or os.getpid() != self.pid:
            return ""
        tag = f"{self.split}/{name}"
        if self.shown_at != self.step:
            self.shown, self.shown_at = set(), self.step
        if tag in self.shown:
            return ""
        self.shown.add(tag)
        return tag

    def _show(self, kind: str, tag: str, value: OnHost | str) -> None:
        media = Media(kind, [tag], value, self.step)
        if self.split == "val":
            self.held.append(media)
        else:
            self.recorder.show(media)


def on_host(notes: list[Note]) -> list[tuple[str, float, float]]:
    """Names, weighted values and weights as plain numbers. Waits for the device."""
    return [(name, float(value) * float(weight), float(weight)) for name, value, weight in notes]
