"""`launcher runs why A B --replay`: both runs once more around their first difference, to find
where they part, and which of the keys that differ explain it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.debug.plan import kept_code, plan_replay
from launcher.debug.trace import first_difference, read_trace
from launcher.errors import RunError
from launcher.runs.run import Run

MOST_KEYS = 12  # each is tried by a replay
BEYOND = 10  # steps after the first difference that keys must explain as well
WORDS = {
    "weights": "the weights are others before step {step}",
    "order": "step {step} takes other samples",
    "sample": "step {step}: sample {name} has another content",
    "batch": "step {step}: the batch is another, and its samples are not",
    "output": "step {step}: the output of module {name} is the first that differs",
    "loss": "step {step}: all modules' outputs are equal, and what train_step returns is not",
    "update": "step {step}: all is equal up to the loss; the update of {name} is not",
    "path": "step {step}: the runs go different ways through the model (at {name})",
}


def by_replay(one: Run, other: Run, found: dict[str, Any]) -> dict[str, Any]:
    """`found` is what `why` gave. Returns {"where": a sentence or None, "tried": the keys that
    differ, "keys": the smallest set of these that explains the difference, or None}."""
    records = found["records"]
    first, equal = records["first"], records["before"]
    if first is None:
        return {"where": None, "tried": [], "keys": None}
    if records["digest_first"] is not None:
        first = min(first, records["digest_first"][0])
    equal = min(equal, first - 1)
    if records["digest_start"] is False:
        equal = 0
    step = max(first, 1)
    last = max(step, min(records["last"], step + BEYOND))
    tried = [c["what"] for c in found["causes"] if c["what"] != "TASK.NAME"]
    theirs = plan_replay(other, step, equal).config
    ours = plan_replay(one, step, equal).config
    tried = [key for key in tried if key in ours and ours[key] != theirs.get(key, ours[key])]
    with tempfile.TemporaryDirectory(prefix="launcher-why-") as folder:
        where = _where(one, other, step, equal, Path(folder))
    values = {key: theirs[key] for key in tried}
    keys = _keys(one, other, values, last, equal) if len(tried) <= MOST_KEYS else None
    return {"where": where, "tried": tried, "keys": keys}


def _where(one: Run, other: Run, step: int, equal: int, folder: Path) -> str | None:
    traces: list[list[Any]] = []
    for number, run in enumerate((one, other)):
        stem = folder / str(number)
        _replay(run, step, equal, "--trace", stem)
        ranks = sorted(folder.glob(f"{number}.rank*"), key=lambda p: int(p.suffix[5:]))
        traces.append([read_trace(path) for path in ranks])
    parts = []
    for rank, (ours, theirs) in enumerate(zip(*traces, strict=False)):
        if (difference := first_difference(ours, theirs)) is not None:
            parts.append((difference[0], list(WORDS).index(difference[1]), rank, difference))
    if not parts:
        return None
    _, _, rank, (at, kind, name) = min(parts)
    told = WORDS[kind].format(step=at, name=name if name != "" else "(the model)")
    return told + (f" (rank {rank})" if len(traces[0]) > 1 else "")


def _keys(one: Run, other: Run, values: dict[str, Any], step: int, equal: int) -> list[str] | None:
    """Which of these values of the other run, put into the first, give its records up to a step."""
    keys = list(values)

    def explains(tried: Sequence[str]) -> bool:
        changed = json.dumps({key: values[key] for key in tried})
        how = ("--with", changed, "--against", other.path.resolve())
        return _replay(one, step, equal, *how, fails=True) == 0

    for key in keys:
        if explains([key]):
            return [key]
    if len(keys) < 2 or not explains(keys):
        return None
    for key in list(keys):
        fewer = [k for k in keys if k != key]
        if len(fewer) > 1 and explains(fewer):
            keys = fewer
    return keys


def _replay(run: Run, step: int, before: int, *more: object, fails: bool = False) -> int:
    command = [sys.executable, "-m", "launcher", "replay", run.path.resolve(), "--step", step]
    kept = kept_code(run, plan_replay(run, step)) is not None
    command += ["--before", before, "--code", "run" if kept else "now", *more]
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if ended.returncode and not fails:
        raise RunError(f"{run.path} could not be replayed to step {step}:\n{ended.stderr}")
    return ended.returncode
