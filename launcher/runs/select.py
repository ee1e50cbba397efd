"""Choosing and ordering runs by what they are and what came out."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    word: str

    def __call__(self, run: Run) -> bool:
        found = run.value(self.key)
        if found is None:
            return False
        compared = OPERATORS[self.sign]
        if _is_number(found):
            try:
                return bool(compared(found, float(self.word)))
            except ValueError:  # a number is not equal to any text, and not ordered with one
                return self.sign == "!="
        if isinstance(found, str):
            return bool(compared(found, self.word))
        # A truth value or a list: as it is written, whatever its blanks, quotes and capitals.
        return bool(compared(_bare(str(found)), _bare(self.word)))


def condition(text: str) -> Condition:
    """Read a condition. Raises UsageError."""
    match = re.fullmatch(r"([^<>=!]+?)\s*(<=|>=|!=|==?|<|>)\s*(.*)", text)
    if match is None:
        raise UsageError(f"--where {text!r}: write KEY=VALUE, or <, <=, >, >=, != instead of =")
    key, sign, word = match.groups()
    return Condition(key.strip(), "=" if sign == "==" else sign, word.strip())


def check(runs: Sequence[Run], keys: Sequence[str]) -> None:
    """Raise UsageError for a key that no run has: it is a misspelling."""
    known = {*COLUMNS, *(key for run in runs for key in (*run.config, *run.summary.series))}
    for key in keys if runs else ():
        bare = re.sub(r"^(min|max|best):", "", key)
        if key not in known and bare not in known:
            near = difflib.get_close_matches(bare, sorted(known), 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(f"no run has {key}{hint}")


def ordered(runs: Sequence[Run], key: str, reverse: bool = False) -> list[Run]:
    """By a key's value, numbers as numbers; runs without one come last either way."""
    values = {id(run): run.value(key) for run in runs}
    have = [run for run in runs if values[id(run)] is not None]

    def place(run: Run) -> Any:
        value = values[id(run)]
        if _is_number(value):
            return 0, value
        # digits-2 before digits-10, and lr-0.05 before lr-0.1: every second part is a number.
        parts = re.split(r"(\d+(?:\.\d+)?)", str(value))
        return 1, [float(part) if odd % 2 else part for odd, part in enumerate(parts)]

    have.sort(key=place, reverse=reverse)
    return have + [run for run in runs if values[id(run)] is None]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _bare(text: str) -> str:
    return re.sub(r"[\s'\"]", "", text).lower()
