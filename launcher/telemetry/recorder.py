"""One recorder of metrics. Values stay on the device and are summed there; once a period they are
put together over the ranks and handed to the sinks on rank 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from launcher.runtime.process import Runtime
from launcher.telemetry.media import Media
from launcher.telemetry.stragglers import Stragglers

# One metrics record: step, epoch, samples, time, and a number for each metric.
Record = dict[str, Any]


class Sink:
    """Where records go; rank 0 alone has one. Methods may raise: see telemetry/background.py."""

    name = ""  # for people
    essential = False  # whether a checkpoint needs all records in it

    def write(self, record: Record) -> None:
        """Take a record; it need not be in the file before `flush`."""

    def show(self, media: Media) -> None:
        """Take a picture, histograms or a text."""

    def finish(self) -> None:
        """The run is complete."""

    def flush(self) -> Any:
        """Have everything in the file."""

    def close(self) -> None:
        """Flush, and end."""


class Recorder:
    """Sums training values between records; `record` turns them into means over ranks and steps."""

    def __init__(self, runtime: Runtime, sink: Sink | None = None) -> None:
        self.runtime, self.sink = runtime, sink
        # For each set of keys that was added together: weighted sums in float64 on the device, and
        # the weight itself as the last element. One small kernel or two an addition.
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}
        self.stragglers = Stragglers()

    def add(self, values: Mapping[str, torch.Tensor], weight: float | torch.Tensor) -> None:
        """Count scalars, means over a batch, with its weight. Never waits for the device."""
        keys = tuple(values)
        stacked = torch.stack([value.detach().double() for value in values.values()])
        if (sums := self._sums.get(keys)) is None:
            sums = torch.zeros(len(keys) + 1, dtype=torch.float64, device=stacked.device)
            self._sums[keys] = sums
        sums[:-1] += stacked * weight
        sums[-1] += weight

    def add_step(self, values: Mapping[str, torch.Tensor]) -> None:
        """Count scalars that are the same on all ranks, once a step."""
        self.add(values, 1.0)

    def record(
        self,
        position: Mapping[str, int],
        extra: Mapping[str, float],
        own_s: Callable[[], float] | None = None,
    ) -> None:
        """Write one record of the means since the last one, and `extra` values of rank 0. `own_s`
        tells this rank's own seconds a step, see OwnTime."""
        # A collective, and the one place where training waits for the device to read values.
        parts = self.runtime.gather((self.state(), own_s() if own_s is not None else None))
        self._sums.clear()
        if parts is None:
            return
        values = {f"train/{key}": value for key, value in _means([s for s, _ in parts]).items()}
        own = [seconds for _, seconds in parts if seconds is not None]
        ranks = self.stragglers.figures(own) if len(own) > 1 else {}
        self.write(position, {**values, **extra, **ranks})

    def write(self, position: Mapping[str, int], values: Mapping[str, float]) -> None:
        """Hand one record to the sink."""
        if self.sink is not None:
            self.sink.write({**position, "time": time.time(), **values})

    def show(self, media: Media) -> None:
        """Hand a picture, histograms or a text to the sink."""
        if self.sink is not None:
            self.sink.show(media)

    def flush(self) -> bool:
        """Have everything written so far in the files; False where that is not possible now."""
        return self.sink is None or self.sink.flush() is not False

    def state(self) -> dict[str, list[float]]:
        """The sums of this rank since the last record. Waits for the device."""
        return {"\n".join(keys): sums.tolist() for keys, sums in self._sums.items()}

    def add_state(self, state: Mapping[str, list[float]]) -> None:
        """Go on from sums that `state` gave, besides those there are."""
        for joined, values in state.items():
            sums = torch.tensor(values, dtype=torch.float64, device=self.runtime.device)
            keys = tuple(joined.split("\n"))
            self._sums[keys] = self._sums[keys] + sums if keys in self._sums else sums


def _means(parts: list[dict[str, list[float]]]) -> dict[str, float]:
    """Means of every key over all ranks' sums, added up in rank order."""
    return means(
        (key, value, sums[-1])
        for part in parts
        for joined, sums in part.items()
        for key, value in zip(joined.split("\n"), sums, strict=False)
    )


def means(sums: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Each name's mean from its weighted sums and their weights, added up in the order given."""
    totals: dict[str, tuple[float, float]] = {}
    for name, value, weight in sums:
        total, weights = totals.get(name, (0.0, 0.0))
        totals[name] = (total + value, weights + weight)
    return {name: total / weight for name, (total, weight) in totals.items() if weight > 0}
