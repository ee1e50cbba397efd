"""Durations and periods: one string with a unit, such as 20ep, 500step or 30min."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

EXAMPLES = "20ep, 500step, 90s, 30min, 24h"

_SECONDS = {"s": 1, "min": 60, "h": 3600}
_LONGEST = 10**15
_FORM = re.compile(r"\s*(-?[0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class Duration:
    """An amount of epochs ("ep"), optimiser steps ("step") or seconds ("s")."""

    amount: int | float
    unit: str

    def __str__(self) -> str:
        """The canonical text; parse_duration gives the same Duration back."""
        return f"{Decimal(str(self.amount)):f}{self.unit}"


def parse_duration(text: str) -> Duration | None:
    """Read a duration; "" is None (never, or no limit). min and h become seconds.

    Raises ValueError, with a message for people, where the text is not a duration.
    """
    if text == "":
        return None
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:60]!r} is not a duration; write for example {EXAMPLES}")
    digits, unit = match.groups()
    if not unit:
        raise ValueError(f"{text[:60]!r} has no unit; write for example {EXAMPLES}")
    if unit not in ("ep", "step", *_SECONDS):
        raise ValueError(f"{unit!r} is not a unit of time; write for example {EXAMPLES}")
    exact = Decimal(digits)
    if exact == 0:
        raise ValueError(f'{text!r} is zero; write "" for never, or for example {EXAMPLES}')
    if exact < 0:
        raise ValueError(f"{text[:60]!r} is negative; write for example {EXAMPLES}")
    if unit in _SECONDS:
        exact, unit = exact * _SECONDS[unit], "s"
    elif exact != int(exact):
        raise ValueError(f"{text[:60]!r}: {unit} takes whole numbers; write for example {EXAMPLES}")
    amount = int(exact) if exact == int(exact) else float(exact)
    if not 0 < amount <= _LONGEST:
        raise ValueError(f"{text[:60]!r} is out of range; write for example {EXAMPLES}")
    return Duration(amount, unit)


def seconds(text: str) -> float:
    """A duration in seconds, of a key that is never "" and takes no other unit."""
    duration = parse_duration(text)
    assert duration is not None and duration.unit == "s"  # the config check demands it
    return duration.amount
