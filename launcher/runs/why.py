"""Why two runs differ: the first record at which they do, and what is known to differ between them
up to there, in the order of how likely it is to explain it.

Nothing is guessed: where all that the runs have written down is equal, that is said, with what
remains.
"""

from __future__ import annotations

from typing import Any

from launcher.errors import UsageError
from launcher.runs.causes import ALL, AT_START, of_ranks
from launcher.runs.difference import difference
from launcher.runs.pair import KINDS, Pair
from launcher.runs.run import Run


def why(one: Run, other: Run) -> dict[str, Any]:
    """The first record at which two runs differ, and the causes that are known. Raises UsageError
    for another program's run."""
    for run in (one, other):
        if not run.ours:
            raise UsageError(f"{run.path} is {run.kind}'s: nothing is known of what it was made of")
    differing = difference(one, other)
    pair = Pair(one, other, differing)
    for compare in ALL:
        compare(pair)
    _what_is_not_told(pair)
    found = pair.found
    strong = [c for c in found.causes if KINDS.index(c.kind) < KINDS.index("weak")]
    if any(cause.what != AT_START for cause in strong):  # what it comes of
        found.causes = [cause for cause in found.causes if cause.what != AT_START]
    found.causes.sort(key=lambda cause: KINDS.index(cause.kind))
    return {
        "runs": [one.name, other.name],
        "paths": [str(one.path), str(other.path)],
        "records": differing.plain(),
        "causes": [vars(cause) for cause in found.causes],
        "harmless": [vars(cause) for cause in found.harmless],
        "unknown": found.unknown,
        "remains": _remains(pair) if differing.first is not None else [],
        "next": _next(pair) if differing.first is not None else [],
    }


def _what_is_not_told(pair: Pair) -> None:
    for run, found in zip(pair.runs, pair.attempts, strict=True):
        if not found:
            pair.found.unknown.append(
                f"{run.name}: config, code and ranks: history.jsonl has no start"
            )
        elif found[0].begin >= pair.last:
            first = found[0].begin
            pair.found.unknown.append(f"{run.name}: all before step {first}: it began there")


def _remains(pair: Pair) -> list[str]:
    """What no file of a run tells."""
    left = ["the content of the data", "files that the task reads by itself"]
    kinds = [of_ranks(run, "device", True) for run in pair.runs]
    settled = all(one.settings.get("DETERMINISTIC") for found in pair.attempts for one in found)
    if "cuda" in map(str, kinds) and not settled:
        left.append("operations whose order is left open on CUDA (DETERMINISTIC is False)")
    left.append("code that draws from an unseeded generator, a clock or the system")
    return left


def _next(pair: Pair) -> list[str]:
    one, other = (str(run.path) for run in pair.runs)
    return [
        f"launcher runs why {one} {other} --replay",
        f"launcher doctor --config-file {pair.runs[0].directory.config}",
    ]
