"""Choosing and ordering runs by what they are and what came out, and a run as plain values."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from launcher.errors import UsageError
from launcher.runs.run import COLUMNS, Run

OPERATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Condition:
    """KEY=VALUE and its like, as a test of a run. A run that has no such key fails it."""

    key: str
    sign: str
    value: Any

    def __call__(self, run: Run) -> bool:
        found = run.value(self.key)
        if found is None:
            return False
        numbers = isinstance(found, (int, float)) and isinstance(self.value, (int, float))
        if not numbers:
            found, value = str(found), str(self.value)
            return bool(OPERATORS[self.sign](found, value))
        return bool(OPERATORS[self.sign](found, self.value))


def condition(text: str) -> Condition:
    """Read a condition. Values are as in YAML: 0.1 is a number. Raises UsageError."""
    match = re.fullmatch(r"([^<>=!]+?)\s*(<=|>=|!=|==?|<|>)\s*(.*)", text)
    if match is None:
        raise UsageError(f"--where {text!r}: write KEY=VALUE, or <, <=, >, >=, != instead of =")
    key, sign, word = match.groups()
    try:
        value: Any = float(word)  # also 1e-3, a text to YAML
    except ValueError:
        try:
            value = yaml.safe_load(word)
        except yaml.YAMLError:
            value = word
    return Condition(key.strip(), "=" if sign == "==" else sign, value)


def check(runs: Sequence[Run], keys: Sequence[str]) -> None:
    """Raise UsageError for a key that no run has: it is a misspelling."""
    if not runs:
        return
    known = set(COLUMNS)
    for run in runs:
        known.update(run.config, run.summary.series)
    for key in keys:
        bare = re.sub(r"^(min|max|best|last):", "", key)
        if key not in known and bare not in known:
            near = difflib.get_close_matches(bare, sorted(known), 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(f"no run has {key}{hint}")


def ordered(runs: Sequence[Run], key: str, reverse: bool) -> list[Run]:
    """By a key's value, numbers as numbers; runs without one come last either way."""
    values = {id(run): run.value(key) for run in runs}
    have = [run for run in runs if values[id(run)] is not None]
    numbers = all(isinstance(values[id(run)], (int, float)) for run in have)

    def place(run: Run) -> Any:
        value = values[id(run)]
        if numbers:
            return value
        # digits-2 before digits-10, and lr-0.05 before lr-0.1: every second part is a number.
        parts = re.split(r"(\d+(?:\.\d+)?)", str(value))
        return [float(part) if odd % 2 else part for odd, part in enumerate(parts)]

    have.sort(key=place, reverse=reverse)
    return have + [run for run in runs if values[id(run)] is None]


def row(run: Run, columns: Sequence[str]) -> dict[str, Any]:
    """A run's line of `list` as plain values; `step` brings `total` along."""
    found = {column: run.value(column) for column in columns}
    return {**found, "total": run.total_steps} if "step" in found else found


def whole(run: Run) -> dict[str, Any]:
    """What `show` shows, as plain values."""
    return {
        "path": str(run.path),
        **row(run, [column for column in COLUMNS if column not in ("run", "best", "last")]),
        "status": vars(run.status) if run.status is not None else None,
        "metrics": {
            key: {
                "count": series.count,
                "nonfinite": series.nulls,
                **{
                    name: None if pair is None else {"step": int(pair[0]), "value": pair[1]}
                    for name, pair in (
                        ("last", series.last),
                        ("min", series.min),
                        ("max", series.max),
                    )
                },
            }
            for key, series in sorted(run.summary.series.items())
        },
        "config": run.config,
        "history": run.history,
        "environment": run.environment,
        "failure": run.failure or None,
        "damaged": run.damaged,
    }
