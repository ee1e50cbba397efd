"""Which samples a step of a run was made of: by arithmetic alone, from its config, the length of
its data set and its number of ranks.

The one thing that does not follow from these is how many batches came before a step: the scaler of
fp16 leaves steps out, and a resume with another batch size begins at its own boundary. That is read
from records and checkpoints, which know steps and samples; where they leave it open it is not told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from launcher.config.changes import DATA
from launcher.data.order import make_order
from launcher.data.plan import ENDLESS, Plan
from launcher.errors import RunError, UsageError
from launcher.runs.attempts import Attempt, attempts
from launcher.runs.run import Run

# What the global batches of a run depend on.
CUTS = (DATA, "TRAIN.BATCH_SIZE", "TRAIN.DROP_LAST")
USED = (
    *CUTS,
    *("TRAIN.MICRO_BATCH_SIZE", "TRAIN.SHARDS", "TRAIN.SAMPLER", "TRAIN.PRECISION", "SEED"),
)
# Those that give the samples of a position without the data set.
BY_ARITHMETIC = ("shuffle", "sequential", "replacement")
# Keys of other orders, that this file does not know.
OTHER_ORDERS = ("DEBUG.OVERFIT_BATCHES",)


@dataclass(frozen=True)
class Known:
    """That after a step so many batches were consumed; `record` where a record says it, which is
    written right after that step's update."""

    step: int
    batches: int
    record: bool = False


def samples(run: Run, step: int, rank: int | None = None) -> dict[str, Any]:
    """The samples of the global batch of a step, by rank and micro-batch; of one rank, or of all.

    Raises UsageError or RunError where they do not follow from what the run has recorded.
    """
    if not run.ours:
        raise UsageError(f"{run.path} is {run.kind}'s: its order of samples is not known")
    found = attempts(run)
    if not found:
        raise RunError(f"{run.directory.history} tells of no start: nothing is known of its ranks")
    number = next((i for i, one in enumerate(found) if one.has(step)), None)
    last = run.total_steps
    if number is None or (last is not None and step > last):
        first = found[0].begin + 1
        to = f" to {last}" if last is not None else " on"
        raise UsageError(f"--step {step}: {run.path} has the steps from {first}{to}")
    attempt = found[number]
    settings, size = attempt.settings, attempt.world_size
    elsewhere = f"`launcher replay {run.path} --step {step}` shows them"
    if size is None:
        raise RunError(f"{run.directory.history} does not tell on how many ranks it ran")
    if lost := sorted(attempt.unknown & set(USED)):
        raise RunError(
            f"{', '.join(lost)} at step {step} is not known: neither {run.directory.environment} "
            f"nor {run.directory.history} tells it. {elsewhere}"
        )
    if rank is not None and rank >= size:
        raise UsageError(f"--rank {rank}: step {step} was done on {size} ranks, from 0")
    if others := [key for key in OTHER_ORDERS if settings.get(key)]:
        raise UsageError(f"With {', '.join(others)} the order is another: {elsewhere}")
    kinds = run.environment.get("kinds", {})
    iterable = kinds.get("train") == "iterable"
    sampler = "sequential" if iterable else settings["TRAIN.SAMPLER"]
    if sampler not in BY_ARITHMETIC:
        raise UsageError(
            f"TRAIN.SAMPLER {sampler} goes by what the data set itself has, which no file of the "
            f"run holds: {elsewhere}"
        )
    plan = _plan(attempt, size)
    total = _batch(run, found, number, step, plan)
    epoch, k = divmod(total, plan.steps_per_epoch)
    order = make_order(sampler, None, plan.length, settings["SEED"], settings["TRAIN.BATCH_SIZE"])
    start, stop = plan.batch(k)
    return {
        "run": str(run.path),
        "step": step,
        "epoch": epoch,
        "batch": k,
        "samples": stop - start,
        "world_size": size,
        "are": "positions" if iterable else "indices",
        "ranks": [
            {
                "rank": one,
                "micro_batches": [
                    order(epoch, np.arange(*cut)).tolist() for cut in plan.micro_batches(k, one)
                ],
            }
            for one in (range(size) if rank is None else [rank])
        ],
        "notes": _notes(run, attempt, step, iterable),
    }


def _plan(attempt: Attempt, size: int) -> Plan:
    keys = attempt.settings
    micro = keys["TRAIN.MICRO_BATCH_SIZE"]  # auto: how a share was cut is not recorded
    cuts = keys["TRAIN.BATCH_SIZE"], keys["TRAIN.DROP_LAST"], size, 0 if micro == "auto" else micro
    return Plan(keys[DATA], *cuts, keys.get("TRAIN.SHARDS", 0))


def _batch(run: Run, found: list[Attempt], number: int, step: int, plan: Plan) -> int:
    """The number of the global batch, counted over all epochs from 0, that a step was made of.
    Raises RunError where that is not known."""
    attempt, earlier = found[number], found[: number + 1]
    cuts = [[one.settings[key] for key in CUTS] for one in earlier]
    unknown = frozenset[str]().union(*(one.unknown for one in earlier)) & {*CUTS, "TRAIN.PRECISION"}
    plain = not any(one.settings["TRAIN.PRECISION"] == "fp16" for one in earlier) and not unknown
    if plain and found[0].begin == 0 and all(one == cuts[0] for one in cuts):
        return step - 1  # a batch a step from the first one on
    known = _known(run, attempt, plan)
    if attempt.settings["TRAIN.PRECISION"] != "fp16":
        if known:
            return known[0].batches + step - known[0].step - 1
        raise RunError(
            f"how many samples came before step {step} is not known: batches were cut otherwise "
            f"up to step {attempt.begin}, and no record or checkpoint of the steps from there on "
            f"is left. `launcher replay {run.path} --step {step}` shows them"
        )
    before = max((one for one in known if one.step < step), key=lambda one: one.step, default=None)
    after = min((one for one in known if one.step >= step), key=lambda one: one.step, default=None)
    if before and after and after.batches - before.batches == after.step - before.step:
        return before.batches + step - before.step - 1  # none was left out between them
    # At a stop and at the end a record may come after batches that the scaler left out.
    ends = {e.get("step") for e in run.history if e.get("event") in ("stop", "finish")}
    if after and after.step == step and after.record and step not in ends:
        return after.batches - 1
    raise RunError(
        f"which batch made step {step} is not known: in fp16 the scaler leaves steps out, and the "
        "records around it do not tell which. With LOG.EVERY 1step they do; "
        f"`launcher replay {run.path} --step {step}` shows it"
    )


def _known(run: Run, attempt: Attempt, plan: Plan) -> list[Known]:
    """What the records and checkpoints of an attempt's steps, and its start, say, by step."""
    found = [Known(0, 0)] if attempt.begin == 0 else []
    table = run.table()
    inside = {
        int(step): int(count)
        for step, count in zip(table.position["step"], table.position["samples"], strict=True)
        if attempt.has(step) and np.isfinite(count)
    }
    for at, count in inside.items():
        found.append(Known(at, plan.batches_in(count), True))
    for manifest in run.directory.checkpoints.glob("step_*/manifest.json"):
        try:
            content = orjson.loads(manifest.read_bytes())
            at, count = int(content["step"]), int(content["samples"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if at == attempt.begin or attempt.has(at):
            found.append(Known(at, plan.batches_in(count)))
    return sorted(found, key=lambda one: (one.step, one.record))


def _notes(run: Run, attempt: Attempt, step: int, iterable: bool) -> list[str]:
    """What to know of the samples told."""
    notes = []
    if step > run.step:
        notes.append(f"step {step} is not known to be done: the run is at step {run.step}")
    if iterable:
        notes.append(
            "the data set is iterable: these are positions in its stream, counted in each epoch "
            "from 0" + (", of which it has one" if attempt.settings[DATA] >= ENDLESS else "")
        )
    if attempt.settings.get("DATALOADER.ON_BAD_SAMPLE") == "skip":
        notes.append(
            "DATALOADER.ON_BAD_SAMPLE skip: in the place of a sample that cannot be read stood the "
            "next one that can; logs/rank*.log names them"
        )
    return notes
