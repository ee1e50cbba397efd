"""What a run records. Values stay on the device and are summed there; once a period they are put
together over the ranks, and rank 0 hands them to the writer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from launcher.edges.returned import check_name, on_device, real
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.tasks import recorder
from launcher.tasks.pictures import drawn, picture, spread
from launcher.telemetry.media import Media, OnHost
from launcher.telemetry.writer import Writer

OF_PHASE = "\x1f"  # between a scalar's name and its phase, until all phases' names are known
ROWS = 64  # kept apart at most, of values on a device
# A scalar of an evaluation: name, value, weight.
Note = tuple[str, Any, Any]


class Recorder(recorder.Recorder):
    """The loop's, and the task's: see launcher/tasks/recorder.py. Scalars are taken on every rank,
    media where the writer is open. In a loader worker a task's calls do nothing."""

    def __init__(self, runtime: Runtime, progress: Progress, writer: Writer) -> None:
        self.runtime, self.progress, self.writer = runtime, progress, writer
        self.pid = os.getpid()
        # For each set of keys that was added together: the means so far, and their weight. A mean
        # moves towards each value by its share, so that equal ones give just that, however large.
        self._means: dict[tuple[str, ...], tuple[list[float], float]] = {}
        # On a device a value is read when a record is made. Until then rows of values, in float64,
        # and their weights; None for those that stand in the row's last column.
        self.late = runtime.device.type != "cpu"
        self._rows: dict[tuple[str, ...], tuple[list[torch.Tensor], list[float | None]]] = {}
        self.split = "train"
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

    def add(self, values: Mapping[str, torch.Tensor], weight: float | torch.Tensor) -> None:
        """Count scalars, means over a batch, with its weight. Never waits for the device."""
        of = f"{OF_PHASE}{self.phase}" if self.phase else ""
        keys = tuple(key + of for key in values) if of else tuple(values)
        if not self.late:
            self._add(keys, [value.item() for value in values.values()], float(weight))
            return
        row = list(values.values())
        if weighs := isinstance(weight, torch.Tensor):
            row.append(weight)
        rows, weights = self._rows.setdefault(keys, ([], []))
        # A copy, by one small kernel and those that change a type: the task may go on with its own.
        rows.append(torch.stack([value.detach().double() for value in row])[None])
        weights.append(None if weighs else float(weight))
        if len(rows) == ROWS:
            rows[:] = [_joined(rows)]

    def _add(self, keys: tuple[str, ...], values: Sequence[float], weight: float) -> None:
        means, before = self._means.get(keys, (values, 0.0))
        total = before + weight
        share = weight / total if before and total else float(not before)
        self._means[keys] = [_towards(*p, share) for p in zip(means, values, strict=True)], total

    def _settle(self) -> None:
        """Read what was added. Waits for the device."""
        for keys, (rows, weights) in self._rows.items():
            for row, weight in zip(_joined(rows).tolist(), weights, strict=True):
                values = row[: len(keys)]
                self._add(keys, values, row[len(keys)] if weight is None else weight)
        self._rows.clear()

    def gather(self, local: Any = None) -> tuple[dict[str, float], list[Any]] | None:
        """The means `train/...` since the last call, and every rank's `local`, in rank order; None
        but on rank 0. A collective."""
        # The one place where training waits for the device to read values.
        parts = self.runtime.gather((self.state(), local))
        self._means.clear()
        if parts is None:
            return None
        found = means(
            (key, value, weight)
            for state, _ in parts
            for keys, (*values, weight) in state.items()
            for key, value in zip(keys.split("\n"), values, strict=True)
        )
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

    def state(self) -> dict[str, list[float]]:
        """The means of this rank since the last record, and their weight. Waits for the device."""
        self._settle()
        return {"\n".join(k): [*means, w] for k, (means, w) in self._means.items()}

    def add_state(self, state: Mapping[str, list[float]]) -> None:
        """Go on from means that `state` gave, besides those there are."""
        for joined, (*values, weight) in state.items():
            self._add(tuple(joined.split("\n")), values, weight)


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    # One may have a column more, where a task weighs some batches and not others.
    width = max(row.shape[1] for row in rows)
    short = any(row.shape[1] < width for row in rows)
    pad = torch.nn.functional.pad
    return torch.cat([pad(r, (0, width - r.shape[1])) for r in rows] if short else rows)


def _towards(mean: float, value: float, share: float) -> float:
    """As torch.lerp, and exact at both ends."""
    if share in (0.0, 1.0):
        return value if share else mean
    if share < 0.5:
        return mean + share * (value - mean)
    return value - (value - mean) * (1.0 - share)


def means(parts: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Each name's mean from the means of parts and their weights, added up in the order given; of
    equal ones just that, however large."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, value, weight in parts:
        found.setdefault(name, []).append((value, weight))
    return {name: _mean(pairs) for name, pairs in found.items() if any(w > 0 for _, w in pairs)}


def _mean(pairs: list[tuple[float, float]]) -> float:
    if len({value for value, _ in pairs}) == 1:
        return pairs[0][0]
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
