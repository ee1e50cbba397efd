"""Two runs beside each other, part by part, and what is found to differ between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from launcher.runs.attempts import Attempt, attempt_of, attempts
from launcher.runs.difference import Difference
from launcher.runs.run import Run

# The kinds of causes, the likeliest to explain a difference first.
KINDS = (
    *("hinted", "key", "code", "lineage", "length", "weights", "ranks", "launcher", "version"),
    *("threads", "device", "variable", "weak", "repository", "beside"),
)


@dataclass(frozen=True)
class Cause:
    """Something that differs: its kind (of KINDS, for the order), what it is, its values in both
    runs, and more to say of it."""

    kind: str
    what: str
    values: list[Any] | None = None
    note: str = ""
    steps: list[int] | None = None  # from and to, where it holds for a part of the steps alone
    hunks: list[list[str]] = field(default_factory=list)


@dataclass
class Found:
    causes: list[Cause] = field(default_factory=list)
    harmless: list[Cause] = field(default_factory=list)  # what differs and cannot be why
    unknown: list[str] = field(default_factory=list)


class Pair:
    """Two runs, and the steps up to their first difference as parts in which neither changed."""

    def __init__(self, one: Run, other: Run, differing: Difference) -> None:
        self.runs, self.differing, self.found = (one, other), differing, Found()
        self.attempts = attempts(one), attempts(other)
        last = differing.first if differing.first is not None else differing.last
        self.last = max(last if last is not None else min(one.step, other.step), 1)
        begins = {a.begin for found in self.attempts for a in found if a.begin < self.last}
        edges = sorted({0, *begins, self.last})
        self.parts = []
        for begin, end in pairwise(edges):
            here = [attempt_of(found, begin + 1) for found in self.attempts]
            if here[0] is not None and here[1] is not None:
                self.parts.append(([begin + 1, end], here[0], here[1]))

    def over_parts(
        self, compare: Callable[[Attempt, Attempt], Mapping[str, Any]]
    ) -> Iterator[tuple[str, Any, list[int] | None]]:
        """What `compare` finds in the parts by name, once for parts that follow on each other; with
        the steps where it is not all of them."""
        open_: dict[str, tuple[Any, list[int]]] = {}
        done: list[tuple[str, Any, list[int]]] = []
        for (begin, end), ours, theirs in self.parts:
            now = compare(ours, theirs)
            for name in [n for n in open_ if n not in now or open_[n][0] != now[n]]:
                done.append((name, *open_.pop(name)))
            for name, value in now.items():
                first = open_[name][1][0] if name in open_ else begin
                open_[name] = value, [first, end]
        done += [(name, *rest) for name, rest in open_.items()]
        whole = [self.parts[0][0][0], self.parts[-1][0][1]] if self.parts else []
        for name, value, steps in done:
            yield name, value, None if steps == whole else steps

    @property
    def keys(self) -> list[str]:
        """The keys of the first record that differs."""
        return list(self.differing.values)

    @property
    def evaluations_alone(self) -> bool:
        """Whether nothing of the training itself differs in that record."""
        ours = ("train/", "digest", "epoch", "samples")
        return bool(self.keys) and not any(key.startswith(ours) for key in self.keys)

    def environment(self, *keys: str) -> list[Any]:
        """A value of both environment.json, None where there is none."""
        found: list[Any] = [run.environment for run in self.runs]
        for key in keys:
            found = [one.get(key) if isinstance(one, dict) else None for one in found]
        return found
