"""What a run records. Values are summed as they come; once a period the sums are put together over
the ranks, and rank 0 hands the means to the writer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from launcher.edges.numbers import Number, Sums
from launcher.edges.returned import check_name, on_device, real
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.tasks import recorder
from launcher.tasks.pictures import drawn, picture, spread
from launcher.telemetry.media import Media, OnHost
from launcher.telemetry.writer import Writer

OF_PHASE = "\x1f"  # between a scalar's name and its phase, until all phases' names are known
# A scalar of an evaluation: name, value, weight.
Note = tuple[str, Any, Any]


class Recorder(recorder.Recorder):
    """The loop's, and the task's: see launcher/tasks/recorder.py. Scalars are taken on every rank,
    media where the writer is open. In a loader worker a task's calls do nothing."""

    def __init__(self, runtime: Runtime, progress: Progress, writer: Writer) -> None:
        self.runtime, self.progress, self.writer = runtime, progress, writer
        self.pid = os.getpid()
        self.sums = Sums(runtime.device)  # of this rank since the last record
        self.split = "train"
        self.alike = False  # whether all ranks record the same of the training: rank 0's counts
        # The phase under way, and of each name the phases that have given it; rank 0 counts.
        self.phase, self.phases = "", dict[str, list[str]]()
        # Of an evaluation: scalars since `take`, and what is shown when it is complete.
        self.notes: list[Note] = []
        self.held: list[Media] = []
        self.shown: dict[str, int] = {}  # of each tag the last step that it was shown at

    def __reduce__(self) -> tuple[type[recorder.Recorder], tuple[()]]:
        # A task may be sent to a spawned loader worker with its collate.
        return recorder.InWorker, ()

    # The task's.

    @property
    def step(self) -> int:
        here = os.getpid() == self.pid
        return self.progress.step + (self.split == "train") if here else recorder.InWorker().step

    def scalar(self, name: str, value: Any, weight: float = 1.0) -> None:
        if os.getpid() != self.pid:
            return
        value = real(name, value)
        if self.split != "train":
            self.notes.append((name, value, weight))
            return
        check_name(name, "recorder.scalar")
        if self.alike and self.runtime.rank:
            return
        self.add({name: on_device(value, self.runtime.device)}, weight)

    def image(self, name: str, image: Any) -> None:
        self._show("image", name, lambda: OnHost(picture(image)))

    def histogram(self, name: str, values: Any) -> None:
        if (values := torch.as_tensor(values)).numel():
            self._show("histogram", name, lambda: OnHost(spread(values)[None]))

    def text(self, name: str, text: str) -> None:
        self._show("text", name, lambda: text)

    def figure(self, name: str, figure: Any) -> None:
        self._show("image", name, lambda: OnHost(picture(drawn(figure))))

    def _show(self, kind: str, name: str, take: Callable[[], OnHost | str]) -> None:
        """Take media, but on another rank, in another process, or where the name was shown at this
        step (by another micro-batch, or a step that the scaler skipped)."""
        tag = f"{self.split}/{name}"
        ours = self.writer.is_open and os.getpid() == self.pid
        if not ours or self.shown.get(tag) == self.step:
            return
        self.shown[tag] = self.step
        media = Media(kind, [tag], take(), self.step)
        if self.split == "train":
            self.writer.show(media)
        else:
            self.held.append(media)

    # The evaluation's.

    @contextmanager
    def evaluating(self, split: str) -> Iterator[None]:
        """While it lasts, what the task records belongs to the evaluation of a split."""
        self.split, self.notes = split, []
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
            self.writer.show(media)
        self.held.clear()

    # The loop's.

    def add(self, values: Mapping[str, Number], weight: Number) -> None:
        """Count scalars, means over a batch, with its weight. Never waits for the device."""
        of = f"{OF_PHASE}{self.phase}" if self.phase else ""
        names = [name + of for name in values] if of else list(values)
        self.sums.add(names, list(values.values()), weight)

    def gather(self, local: Any = None) -> tuple[dict[str, float], list[Any]] | None:
        """The means `train/...` since the last call, and every rank's `local`, in rank order; None
        but on rank 0. A collective."""
        # The one place where training waits for the device to read values.
        parts = self.runtime.gather((self.sums.state(), local))
        self.sums.clear()
        if parts is None:
            return None
        for state, _ in parts:
            self.sums.merge(state)
        found = {name: m for name, m in self.sums.means().items() if self.sums.weighs(name)}
        self.sums.clear()
        return self._named(found), [local for _, local in parts]

    def _named(self, found: Mapping[str, float]) -> dict[str, float]:
        """The means as `train/<name>`; those that several phases have given carry the phase."""
        split = [(*key.partition(OF_PHASE)[::2], value) for key, value in found.items()]
        for name, phase, _ in sorted(split, key=lambda part: not part[1]):  # "" is of no phase
            if (phase or name in self.phases) and phase not in self.phases.setdefault(name, []):
                self.phases[name].append(phase)
        return {
            f"train/{name}/{phase}"
            if phase and len(self.phases[name]) > 1
            else f"train/{name}": value
            for name, phase, value in split
        }

    def write(self, values: Mapping[str, float]) -> None:
        """Write one record at the present progress. On rank 0; elsewhere it does nothing."""
        self.writer.write({**self.progress.as_dict(), "time": time.time(), **values})
