"""Mistakes in a config: found one by one, reported all at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.errors import UsageError


class Mistake(ValueError):
    """One value is wrong; the loader adds where it stands and collects it as a Problem."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Problem:
    """One mistake: where it stands, its key ("" for a whole file), what is wrong, and a hint."""

    where: str
    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.key}: {self.message}" if self.key else self.message
        return f"{text} (did you mean {self.hint}?)" if self.hint else text


class ConfigError(UsageError):
    """Every mistake of a config in one report; `note` is a last line about what was not checked."""

    def __init__(self, problems: Sequence[Problem], note: str = "") -> None:
        self.problems = list(dict.fromkeys(problems))  # a base read twice reports once
        count = len(self.problems)
        width = max((len(problem.where) for problem in self.problems), default=0)
        lines = [f"{count} mistake{'s' if count != 1 else ''} in the config:"]
        lines += [f"  {problem.where:<{width}}  {problem}" for problem in self.problems]
        super().__init__("\n".join([*lines, note] if note else lines))


def quote(value: object) -> str:
    """The value as it was written, in quotes, cut where it is long."""
    text = str(value)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def nearest(word: str, words: Iterable[str]) -> str:
    """The known word that `word` most likely stands for, or ""; upper and lower case are alike."""
    known = {candidate.lower(): candidate for candidate in words}
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.7)
    return known[close[0]] if close else ""


def nearest_key(name: str, keys: Iterable[str]) -> str:
    """The key meant by `name`: the same last part (TRAIN.LR: OPTIM.LR) before a similar name."""

    def last(key: str) -> str:
        return key.rsplit(".", 1)[-1].lower()

    def likeness(key: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), key.lower()).ratio()

    keys = list(keys)
    same = [key for key in keys if last(key) == last(name)]
    if same:
        return max(same, key=likeness)
    by_last = {last(key): key for key in keys}
    return nearest(name, keys) or by_last.get(nearest(last(name), by_last), "")
