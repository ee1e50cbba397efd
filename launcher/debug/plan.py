"""What a replay of a step needs to know of a run, from its directory alone; imports no torch."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UsageError
from launcher.runs.run import Run

# What differs between two runs of the same bits.
FREE = ("time", "perf/", "system/")


@dataclass(frozen=True)
class ReplayPlan:
    """How to come to a step once more."""

    step: int
    world_size: int  # of the attempt that did it
    checkpoint: Path | None  # to start from; None: from the start
    begin: int  # its step
    allow: frozenset[str]  # keys that were changed between it and the step
    config: dict[str, Any]  # key -> value, as the attempt had it


def plan_replay(run: Run, step: int) -> ReplayPlan:
    """Raises UsageError where the run has not done the step, or nothing can lead to it."""
    path = run.path
    if not run.ours or not run.attempts:
        raise UsageError(f"{path} is no run of the launcher's that can be replayed")
    if not 1 <= step <= run.step:
        raise UsageError(
            f"{path} has done the steps 1 to {run.step}; --step {step} is none of them"
        )
    # Those that led to the step; one that went back before it did it anew.
    attempts = [e for e in (run.history[i] for i in run.attempts) if e["step"] < step]
    last = attempts[-1]
    found, why = _checkpoint(path, step), ""
    begin = found[0] if found else 0
    if found is None and attempts[0].get("from"):
        first = Path(attempts[0]["from"])
        begin, found = attempts[0]["step"], (attempts[0]["step"], first)
        if not first.exists():
            why = f"it began from {first}, which is gone"
    crossed = [e for e in attempts if e["step"] > begin or e is last]
    if len({e["world_size"] for e in crossed if e["step"] >= begin} | {last["world_size"]}) > 1:
        sizes = ", ".join(f"{e['world_size']} from step {e['step']}" for e in crossed)
        why = f"between step {begin} and step {step} it had other numbers of ranks ({sizes})"
    if why:
        raise UsageError(
            f"{path}: step {step} cannot be replayed: {why}. No checkpoint before it is kept that "
            "would do: CHECKPOINT.KEEP_EVERY keeps some for good."
        )
    allow = {key for e in attempts if e["step"] >= begin for key, _, _ in changes(e)}
    config = dict(run.config)
    since = [i for i in run.attempts if i > run.history.index(last)]
    for place in reversed(since):  # config.yaml is that of the last attempt
        config |= {key: before for key, before, _ in changes(run.history[place]) if key in config}
    checkpoint = found[1] if found else None
    return ReplayPlan(step, last["world_size"], checkpoint, begin, frozenset(allow), config)


def changes(event: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Key, value before and value after of what a resume has changed (config/changes.py)."""
    found = []
    for text in event.get("differs", ()):
        if (match := re.match(r"([A-Z][\w.]*): (.*)", text, re.DOTALL)) is None:
            continue
        parts = match[2].split(" -> ")
        for cut in range(1, len(parts)):
            with contextlib.suppress(ValueError, SyntaxError):
                before, after = " -> ".join(parts[:cut]), " -> ".join(parts[cut:])
                found.append((match[1], ast.literal_eval(before), ast.literal_eval(after)))
                break
    return found


def _checkpoint(run: Path, step: int) -> tuple[int, Path] | None:
    """The newest whole checkpoint before a step."""
    steps = []
    for manifest in (run / "checkpoints").glob("step_*/manifest.json"):
        number = manifest.parent.name.removeprefix("step_")
        if number.isdigit() and int(number) < step:
            steps.append((int(number), manifest.parent))
    return max(steps, default=None)


def recorded(run: Path) -> dict[int, dict[str, Any]]:
    """step -> all that a run has recorded of it, but for what differs between two runs of the same
    bits."""
    found: dict[int, dict[str, Any]] = {}
    with (run / "metrics.jsonl").open(encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:  # a torn last line, of a live run
                continue
            kept = {k: v for k, v in record.items() if not k.startswith(FREE)}
            nonfinite = found.get(record["step"], {}).get("nonfinite", [])
            nonfinite = sorted({*nonfinite, *kept.get("nonfinite", [])})
            found.setdefault(record["step"], {}).update(kept)
            if nonfinite:
                found[record["step"]]["nonfinite"] = nonfinite
    return found
