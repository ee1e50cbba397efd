"""The first record at which two runs differ, and how far they are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import orjson

from launcher.runs.records import Damage, objects
from launcher.runs.run import Run

FREE = ("time", "perf/", "system/")  # what may differ between two runs of one seed
# Of a training record: not means over the steps since the record before.
AT_STEP = ("train/lr", "train/skipped_steps", "digest")
DIGEST = "digest"
Values = dict[str, Any]


@dataclass
class Difference:
    """`first` is the first step at which a value differs, with the values of both runs by key."""

    first: int | None = None
    values: dict[str, list[Any]] = field(default_factory=dict)
    before: int = 0  # the last step before it that was compared; 0 where there is none
    steps: int = 0  # that both have recorded
    last: int | None = None  # of these
    apart: int = 0  # steps whose training values are means over other steps in the other run
    only: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    digest_first: tuple[int, list[int]] | None = None  # the first that differs
    digest_equal: int | None = None  # the last step before that with an equal one
    digest_start: bool | None = None  # whether those of step 0 are equal

    def plain(self) -> dict[str, Any]:
        return {**vars(self), "only": list(self.only)}


@dataclass
class _Step:
    """What a run has recorded at a step; `since` is the step of the training record before."""

    means: Values = field(default_factory=dict)
    others: Values = field(default_factory=dict)
    since: int = 0


def difference(one: Run, other: Run) -> Difference:
    """Compare the records of two runs at the steps that both have. That one of them ended earlier,
    or recorded more often, is no difference."""
    found = Difference()
    keys: tuple[set[str], set[str]] = (set(), set())
    for step, ours, theirs in _common(_steps(one), _steps(other)):
        found.steps, found.last = found.steps + 1, step
        pairs = [(ours.others, theirs.others)]
        comparable = ours.since == theirs.since
        if comparable:
            pairs.append((ours.means, theirs.means))
        elif ours.means and theirs.means:
            found.apart += 1
        differing: dict[str, list[Any]] = {}
        for mine, its in pairs:
            keys[0].update(mine)
            keys[1].update(its)
            both = (key for key in mine if key in its and mine[key] != its[key])
            differing |= {key: [mine[key], its[key]] for key in both}
        _digests(found, step, ours.others.get(DIGEST), theirs.others.get(DIGEST))
        if found.first is None and differing:
            found.first, found.values = step, dict(sorted(differing.items()))
        elif found.first is None:
            found.before = step
    found.only = (sorted(keys[0] - keys[1]), sorted(keys[1] - keys[0]))
    return found


def _digests(found: Difference, step: int, ours: Any, theirs: Any) -> None:
    if not isinstance(ours, int) or not isinstance(theirs, int):
        return
    if step == 0:
        found.digest_start = ours == theirs
    if found.digest_first is None and ours == theirs:
        found.digest_equal = step
    elif found.digest_first is None:
        found.digest_first = (step, [ours, theirs])


def _common(
    one: Iterator[tuple[int, _Step]], other: Iterator[tuple[int, _Step]]
) -> Iterator[tuple[int, _Step, _Step]]:
    """The steps that both have, read side by side: the files may be larger than the memory."""
    mine, its = next(one, None), next(other, None)
    while mine is not None and its is not None:
        if mine[0] == its[0]:
            yield mine[0], mine[1], its[1]
            mine, its = next(one, None), next(other, None)
        elif mine[0] < its[0]:
            mine = next(one, None)
        else:
            its = next(other, None)


def _steps(run: Run) -> Iterator[tuple[int, _Step]]:
    """All of a run's steps with a record, rising."""
    since, last = 0, -1
    try:
        file = run.records.open("rb")
    except FileNotFoundError:  # nothing is recorded yet
        return
    with file:
        # Digests are integers of more digits than a float has: no Table.
        whole = (record for _, record in objects(file, orjson.loads))
        records = (r for r in whole if not isinstance(r, Damage) and type(r.get("step")) is int)
        for step, group in groupby(records, key=lambda record: record["step"]):
            if step <= last:
                continue
            made = _Step(since=since)
            for record in group:
                training = any(key.startswith("train/") for key in record)
                for key, value in record.items():
                    if key in ("step", "nonfinite") or key.startswith(FREE):
                        continue
                    if training and key not in ("epoch", "samples") and not _at_step(key):
                        made.means[key] = value
                    else:
                        made.others.setdefault(key, value)
                since = step if training else since
            last = step
            yield step, made


def _at_step(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}/") for name in AT_STEP)
