"""Whether a run's first steps can be repeated bit for bit, and if not, what differs first."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from launcher.debug.doctor.attempt import Attempt, attempt
from launcher.debug.doctor.findings import Finding, Topic
from launcher.debug.doctor.needs import failed
from launcher.debug.doctor.operators import (
    Event,
    first_difference,
    line_of_stack,
    shown,
)
from launcher.edges.model import some
from launcher.engine.run import Job
from launcher.runtime.process import Runtime

TOPIC = Topic("determinism")
NAME = "first steps"
OUTSIDE = (
    "draw such numbers from torch's, numpy's or Python's global generators, which the launcher "
    "seeds, or from a generator that is made from the config's SEED; take none from the time, "
    "os.urandom, or what stays in the process from an earlier run (class attributes, modules)"
)


def determinism(job: Job, runtime: Runtime, steps: int) -> Iterator[Finding]:
    """Run the first steps twice, and once more with other contents in memory that is left as it
    was."""
    try:
        first, second = (_fresh(job, runtime, steps, fill=0) for _ in range(2))
        if told := unlike(first, second, runtime.device.type, job.cfg.DETERMINISTIC):
            yield told
            return
    except Exception as error:  # the user's own code
        yield failed(NAME, error)
        return
    done = len(first.weights)
    same = f"{done} step{'s' * (done > 1)}, twice from the same seed: equal bit for bit"
    share = f" (rank 0's share of {runtime.world_size}, nothing exchanged)"
    same += share if runtime.world_size > 1 else ""
    try:
        third = _fresh(job, runtime, steps, fill=1)
    except Exception as error:
        yield _uninitialised(f"the steps fail then: {type(error).__name__}: {error}")
        return
    if _results(first) == _results(third):
        yield TOPIC.ok(NAME, same)
        return
    place = first_difference(first.events, third.events, judged=True)
    event = (place[1] or place[2]) if place else None
    yield _uninitialised(f"first in {_where(event)}" if event else "no operator shows where")


def _fresh(job: Job, runtime: Runtime, steps: int, fill: int) -> Attempt:
    found = attempt(job, runtime, steps, fill)
    gc.collect()  # a model in a cycle would take the next one's memory
    return found


def _results(one: Attempt) -> Any:
    return one.losses, one.weights


def _uninitialised(what: str) -> Finding:
    return TOPIC.problem(
        NAME,
        "the result depends on what lies in memory that torch.empty (or new_empty, empty_like) "
        f"leaves as it was: {what}",
        "take torch.zeros, or write all of it before it is read",
    )


def unlike(first: Attempt, second: Attempt, device: str, deterministic: bool) -> Finding | None:
    """What differs first between two attempts whose results are not equal; None where they are."""
    if first.lengths != second.lengths:
        told = f"the data sets have other lengths: {first.lengths}, then {second.lengths}"
        return TOPIC.problem(NAME, told, "let build_dataset give the same each time")
    if first.built != second.built:
        names = [n for n, value in first.built.items() if second.built.get(n) != value]
        told = f"build_model gives other weights from the same seed: {some(names)}"
        return TOPIC.problem(NAME, told, OUTSIDE)
    if _results(first) == _results(second):
        return None
    steps = zip(first.losses, second.losses, first.weights, second.weights, strict=False)
    at = next((i for i, (a, b, c, d) in enumerate(steps) if a != b or c != d), 0)
    what = [
        word
        for word, one, other in (
            ("losses", first.losses, second.losses),
            ("weights", first.weights, second.weights),
        )
        if one[at : at + 1] != other[at : at + 1]
    ]
    told = f"{' and '.join(what) or 'the number of steps'} differ in step {at + 1}"
    place = first_difference(first.events, second.events)
    within = _step_of(place[0], first) if place else at
    if batch := _batches(first, second, within):
        return TOPIC.problem(NAME, f"{told}; {batch[0]}", batch[1])
    if place is None:
        return TOPIC.problem(
            NAME,
            f"{told}, though no operator of torch does: something else changes the numbers, such "
            "as numpy on a tensor's memory, or a kernel that torch's dispatcher does not see",
            OUTSIDE,
        )
    _, a, b = place
    cause, remedy = _cause(a, b, device, deterministic)
    finding = f"{told}; the first operator that differs: {_where(a or b)}, in step {within + 1}. "
    if device == "cuda" and not deterministic and cause.startswith("Its result"):
        return TOPIC.warning(NAME, finding + cause, remedy)
    return TOPIC.problem(NAME, finding + cause, remedy)


def _step_of(place: int, one: Attempt) -> int:
    return next((i for i, end in enumerate(one.ends) if place < end), len(one.ends) - 1)


def _batches(first: Attempt, second: Attempt, last: int) -> tuple[str, str] | None:
    """What is told of the first batch, up to a step, that differs; and the remedy."""
    for step in range(min(last + 1, len(first.batches), len(second.batches))):
        if first.samples[step] != second.samples[step]:
            return (
                f"the order of the samples differs first, in step {step + 1}",
                "let the data set's `order`, `weights`, `groups` and `lengths` be the same each "
                "time: pure functions of the epoch",
            )
        for samples, a, b in zip(
            first.samples[step], first.batches[step], second.batches[step], strict=True
        ):
            if a == b:
                continue
            return (
                f"the batch differs first, in step {step + 1}, before the model takes it: from the "
                f"data set or collate{_rows(samples, a, b)}",
                OUTSIDE,
            )
    return None


def _rows(samples: list[int], a: list[Any], b: list[Any]) -> str:
    """Which samples differ, where a batch's rows are its samples."""
    found: set[int] = set()
    for one, other in zip(a, b, strict=False):
        if one == other:
            continue
        if one[0] != other[0]:
            return f" ({one[0]}, then {other[0]})"
        if len(one[1]) != len(samples):
            return ""
        found |= {s for s, x, y in zip(samples, one[1], other[1], strict=True) if x != y}
    names = some([str(sample) for sample in sorted(found)])
    return f": sample{'s' * (len(found) > 1)} {names}" if found else ""


def _where(event: Event | None) -> str:
    """An operator, its pass and module, and the user's line."""
    if event is None:
        return "none"
    passes = {
        "forward": "in the forward pass",
        "backward": "in the backward pass",
        "update": "after the backward pass (gradients, update, hooks)",
    }
    parts = [f"{event.name} {passes[event.stage]}"]
    if event.module:
        parts.append(f"of {event.module}")
    text = " ".join(parts)
    if event.line:
        return f"{text}, at {shown(event.line)}"
    if line := line_of_stack(event.forward):
        return f"{text}, made by the forward pass at {shown(line)}"
    return text


def _cause(a: Event | None, b: Event | None, device: str, deterministic: bool) -> tuple[str, str]:
    """Why it differs, as far as that can be told, and the remedy."""
    if a is None or b is None or a.name != b.name:
        other = b.name if b is not None else "none"
        return (
            f"The other run had {other} there: the code takes another way",
            f"let what the code decides by be the same each time: {OUTSIDE}",
        )
    generators = [(x, y) for x, y in zip(_generators(a), _generators(b), strict=False) if x != y]
    if generators:
        return (
            "It draws from a generator that is in another state",
            "make the generator anew, seeded from the config's SEED, for each run",
        )
    if a.takes != b.takes:
        return (
            "What it takes differs already, and no operator of torch made that: numbers came from "
            "elsewhere (Python, numpy, the time, a file)",
            OUTSIDE,
        )
    if a.random:
        return (
            "It draws random numbers, and the generator that it draws from was in another state",
            OUTSIDE,
        )
    if device == "cuda" and not deterministic:
        return (
            "Its result from the same input is another each time, as that of kernels that sum "
            "with atomics is",
            "set DETERMINISTIC True, which takes other kernels, or refuses those that have none",
        )
    return (
        "Its result from the same input is another each time",
        "if it is an operator of your own, look at it; else replace it by a deterministic one",
    )


def _generators(event: Event) -> list[Any]:
    """The digests of generators' states among what it takes."""
    return [one for one in event.takes if isinstance(one, tuple) and one[0] == "generator"]
