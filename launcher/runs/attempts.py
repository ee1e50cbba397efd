"""The attempts of a run, by its history: from which step to which each counts, on how many ranks,
with which config and code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.config.changes import DATA
from launcher.config.keys import KEYS
from launcher.runs.run import Run


@dataclass(frozen=True)
class Attempt:
    """A start or a resume. Its steps are those after `begin`, up to `end` (None: it is the last);
    what it did after that, a later attempt has done once more."""

    begin: int
    end: int | None
    record: Mapping[str, Any]  # history's
    settings: dict[str, Any]  # the config by dotted key, with defaults, and DATASET_LENGTH
    unknown: frozenset[str] = field(default_factory=frozenset)  # keys whose value is not known

    @property
    def world_size(self) -> int | None:
        size = self.record.get("world_size")
        return size if isinstance(size, int) and size > 0 else None

    @property
    def code(self) -> str:
        """The name of its version in code/; "" where an earlier launcher kept none."""
        return str(self.record.get("code", ""))

    def has(self, step: int) -> bool:
        return self.begin < step and (self.end is None or step <= self.end)


def attempts(run: Run) -> list[Attempt]:
    """The attempts whose steps stand, oldest first; the last one stands in any case.

    config.yaml and environment.json are the last attempt's. What a resume has in `differs`, against
    the checkpoint that it goes on from, leads back to the attempt that made that checkpoint.
    """
    records = [
        record
        for record in (run.history[place] for place in run.attempts)
        if isinstance(record.get("step"), int)
    ]
    lengths = run.environment.get("lengths")
    length = lengths.get("train") if isinstance(lengths, dict) else None
    settings = {key.name: key.default for key in KEYS} | run.config | {DATA: length}
    unknown = frozenset() if isinstance(length, int) else frozenset([DATA])
    found: list[Attempt] = []
    end: int | None = None
    for record in reversed(records):
        begin = record["step"]
        if end is not None and begin >= end:
            continue  # all that it did was done once more
        found.append(Attempt(begin, end, record, settings, unknown))
        before, lost = undone(record.get("differs"))
        settings = settings | before
        unknown = (unknown - set(before)) | lost
        end = begin
    return found[::-1]


def undone(differs: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The values before the changes that a resume's `differs` tells, and the keys whose value
    before cannot be read from it."""
    before, lost = dict[str, Any](), set()
    for text in differs if isinstance(differs, list) else ():
        match = re.fullmatch(r"([\w.]+): (.*)", str(text), re.DOTALL)
        if match is None or " -> " not in match[2]:
            continue  # no key: the state of an optimiser that begins afresh, say
        parts = match[2].split(" -> ")
        # An arrow may stand in a text that is a value: one place alone parts two values.
        sides = [(" -> ".join(parts[:i]), " -> ".join(parts[i:])) for i in range(1, len(parts))]
        values = [left for left, right in sides if _is_value(left) and _is_value(right)]
        if len(values) == 1:
            before[match[1]] = ast.literal_eval(values[0])
        else:
            lost.add(match[1])
    return before, frozenset(lost)


def _is_value(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def attempt_of(found: Iterable[Attempt], step: int) -> Attempt | None:
    """The attempt that did a step, or would do it; None for one before the first of all."""
    return next((attempt for attempt in found if attempt.has(step)), None)
