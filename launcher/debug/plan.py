"""How to come to a step of a run once more, from its directory alone; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.changes import DATA
from launcher.errors import UsageError
from launcher.provenance.kept import Version, versions
from launcher.runs.attempts import Attempt, attempt_of, attempts
from launcher.runs.difference import FREE
from launcher.runs.records import read_objects
from launcher.runs.run import Run
from launcher.telemetry.rundir import RunDirectory


@dataclass(frozen=True)
class ReplayPlan:
    """What a replay starts from, and as what."""

    step: int
    ranks: int  # of the attempt that did it
    world_size: int  # to replay it on: as many, or one where that gives the same bits
    checkpoint: Path | None  # to start from; None: from the start
    begin: int  # its step
    allow: frozenset[str]  # keys that were changed between it and the step
    config: dict[str, Any]  # key -> value, as that attempt had it
    code: str  # the name of its version in code/; "" where none is kept


def plan_replay(
    run: Run, step: int, before: int | None = None, changed: Mapping[str, Any] | None = None
) -> ReplayPlan:
    """From the newest checkpoint of at most the step `before`, if given; with these values of some
    keys instead of the run's own.

    Raises UsageError where the run has not done the step, or no kept checkpoint leads to it.
    """
    path = run.path
    found = attempts(run) if run.ours else []
    # Of a run that failed, the step after its last one is what it failed in.
    if not found or not 1 <= step <= run.step + (run.state != "completed"):
        done = f"{path} has done the steps 1 to {run.step}"
        raise UsageError(f"{done}; --step {step} is none of them")
    if (last := attempt_of(found, step)) is None or last.world_size is None:
        raise UsageError(f"{path}: its history.jsonl does not tell which attempt did step {step}")
    most = step - 1 if before is None else min(before, step - 1)
    begin, checkpoint = _start(run, most, found[0])
    # Those that did the steps on the way.
    way = [a for a in found if a.begin < step and (a.end is None or a.end > begin)]
    sizes = [a.world_size for a in way]
    with_shards = [a.settings.get("TRAIN.SHARDS", 0) for a in way]
    shards = all((changed or {}).get("TRAIN.SHARDS", one) for one in with_shards)
    if len(set(sizes)) > 1 and not shards:
        raise UsageError(
            f"{path}: step {step} cannot be replayed. The newest checkpoint before it that is kept "
            f"is of step {begin}, and on the way the run had {', then '.join(map(str, sizes))} "
            "ranks. CHECKPOINT.KEEP_EVERY keeps more of them."
        )
    changed = changed or {}
    config = {k: v for k, v in {**last.settings, **changed}.items() if k != DATA}
    # The attempt that saved the checkpoint may have had other values, too.
    saved = attempt_of(found, begin) if begin else None
    others = [a.settings for a in (*way, saved) if a is not None]
    allow = {key for s in others for key in s if s[key] != last.settings.get(key)} | set(changed)
    ranks = last.world_size, 1 if shards else last.world_size
    return ReplayPlan(step, *ranks, checkpoint, begin, frozenset(allow), config, last.code)


def _start(run: Run, most: int, first: Attempt) -> tuple[int, Path | None]:
    """The newest checkpoint of at most a step, and its step; else what the run itself began
    from."""
    steps = []
    for manifest in run.directory.checkpoints.glob("step_*/manifest.json"):
        number = manifest.parent.name.removeprefix("step_")
        if number.isdigit() and int(number) <= most:
            steps.append((int(number), manifest.parent))
    if steps:
        return max(steps)
    origin = first.record.get("from")
    if origin is not None and not Path(origin).exists():
        raise UsageError(f"{run.path} began from {origin}, which is gone, and keeps no checkpoint")
    return first.begin, Path(origin) if origin is not None else None


def recorded(run: Path) -> dict[int, dict[str, Any]]:
    """step -> all that a run has recorded of it, but for what differs between two runs of the same
    bits."""
    found: dict[int, dict[str, Any]] = {}
    for record in read_objects(RunDirectory(run).metrics)[0]:
        kept = {k: v for k, v in record.items() if not k.startswith(FREE)}
        found.setdefault(record["step"], {}).update(kept)
    return found


def kept_code(run: Run, plan: ReplayPlan) -> Version | None:
    """The version of the task's files with which the step was done, where the run keeps it."""
    return next((one for one in versions(run.path) if one.name == plan.code), None)
