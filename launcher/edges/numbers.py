"""Sums of numbers, exact: of Python's, and of those that are still on a device.

A float is a whole number over a power of two, and so is every sum of such: kept whole, it is the
same in whatever order and parts it is added up, and on whichever ranks. It is rounded once, when a
mean is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from launcher.edges.returned import on_device

Number = float | torch.Tensor
ROWS = 64  # kept apart at most, of values on a device


class Sum:
    """Of values times weights, and of the weights: whole numbers over powers of two."""

    __slots__ = ("odd", "total", "under_total", "under_weight", "weight")

    def __init__(self) -> None:
        self.total, self.under_total = 0, 0  # total / 2 ** under_total
        self.weight, self.under_weight = 0, 0
        self.odd = 0.0  # the sum of what is not finite

    def add(self, value: float, weight: float) -> None:
        if not (math.isfinite(value) and math.isfinite(weight)):
            self.odd += value if weight else 0.0
            self.odd += 0.0 if math.isfinite(weight) else math.nan
            value, weight = 0.0, weight if math.isfinite(weight) else 1.0
        (v, over_v), (w, over_w) = value.as_integer_ratio(), weight.as_integer_ratio()
        under_v, under_w = over_v.bit_length() - 1, over_w.bit_length() - 1  # powers of two
        self.merge(v * w, under_v + under_w, w, under_w)

    def merge(self, total: int, under: int, weight: int, under_weight: int, odd: float = 0) -> None:
        if under > self.under_total:
            self.total, self.under_total = self.total << (under - self.under_total), under
        self.total += total << (self.under_total - under)
        if under_weight > self.under_weight:
            self.weight <<= under_weight - self.under_weight
            self.under_weight = under_weight
        self.weight += weight << (self.under_weight - under_weight)
        self.odd += odd

    def mean(self) -> float:
        """NaN where nothing has a weight."""
        if self.odd or math.isnan(self.odd) or self.weight == 0:
            return self.odd if self.weight else math.nan
        return (self.total << self.under_weight) / (self.weight << self.under_total)


class Sums:
    """Weighted means of named numbers.

    What is on a `device` is read when the sums are: until then it is kept in rows, which takes one
    small kernel an addition, and the host never waits.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device if device is not None and device.type != "cpu" else None
        self._sums: dict[str, Sum] = {}
        # By the names that are added together: rows of values in float64, and their weights; None
        # for those that stand in a row's last column.
        self._rows: dict[tuple[str, ...], tuple[list[torch.Tensor], list[float | None]]] = {}
        # On the CPU what was read, and is not added up yet: many at once take half the time.
        self._read: list[tuple[Sequence[str], list[Any]]] = []  # the weight last

    def add(self, names: Sequence[str], values: Sequence[Number], weight: Number) -> None:
        if self.device is None:
            numbers = (*values, weight)
            read = [v.item() if isinstance(v, torch.Tensor) else v for v in numbers]
            self._read.append((names, read))
            if len(self._read) == ROWS:
                self._settle()
            return
        weighs = isinstance(weight, torch.Tensor)
        row = [on_device(v, self.device).double() for v in (*values, *[weight] * weighs)]
        rows, weights = self._rows.setdefault(tuple(names), ([], []))
        # A copy: whoever gave the values may go on with them.
        rows.append(torch.stack(row).detach()[None])
        weights.append(None if weighs else float(weight))
        if len(rows) == ROWS:
            rows[:] = [_joined(rows)]

    def _add(self, names: Sequence[str], values: Sequence[float], weight: float) -> None:
        for name, value in zip(names, values, strict=True):
            if (found := self._sums.get(name)) is None:
                found = self._sums[name] = Sum()
            found.add(value, weight)

    def _settle(self) -> dict[str, Sum]:
        """The sums of all that was added. Waits for the device."""
        for given, read in self._read:
            *numbers, weighs = map(float, read)
            self._add(given, numbers, weighs)
        self._read.clear()
        for names, (rows, weights) in self._rows.items():
            for row, weight in zip(_joined(rows).tolist(), weights, strict=True):
                self._add(names, row[: len(names)], row[len(names)] if weight is None else weight)
        self._rows.clear()
        return self._sums

    def means(self) -> dict[str, float]:
        """The mean of each; NaN where all that was added has no weight. Waits for the device."""
        return {name: one.mean() for name, one in self._settle().items()}

    def weighs(self, name: str) -> bool:
        """Whether anything that was added under this name has a weight."""
        return bool(self._settle()[name].weight)

    def state(self) -> dict[str, list[Any]]:
        """The sums as plain values, whole numbers in hexadecimal. Waits for the device."""
        return {
            name: [f"{s.total:x}", s.under_total, f"{s.weight:x}", s.under_weight, s.odd]
            for name, s in self._settle().items()
        }

    def merge(self, state: Mapping[str, Sequence[Any]]) -> None:
        """Add what `state` gave."""
        for name, (total, under, weight, under_weight, odd) in state.items():
            one = self._sums.setdefault(name, Sum())
            one.merge(int(total, 16), under, int(weight, 16), under_weight, odd)

    def absorb(self, other: Sums) -> None:
        """Add what another one holds. Waits for the device."""
        for name, s in other._settle().items():
            one = self._sums.setdefault(name, Sum())
            one.merge(s.total, s.under_total, s.weight, s.under_weight, s.odd)

    def clear(self) -> None:
        self._sums.clear()
        self._read.clear()
        self._rows.clear()


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    # One may have a column more, where a task weighs some batches and not others.
    width = max(row.shape[1] for row in rows)
    short, pad = any(row.shape[1] < width for row in rows), torch.nn.functional.pad
    return torch.cat([pad(r, (0, width - r.shape[1])) for r in rows] if short else rows)
