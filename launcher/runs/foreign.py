"""Runs of other programs as records, recognised by what stands in their files.

detectron2's metrics.json, mmengine's scalars.json, Lightning's metrics.csv, TensorBoard's events.
"""

from __future__ import annotations

import contextlib
import csv
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from launcher.runs.records import POSITION, Damage, Table

# Both mean seconds by them, not a moment as `time` does in our records.
RENAMED = {"time": "perf/step_s", "data_time": "perf/data_s"}


def recognise(path: Path) -> tuple[str, Path] | None:
    """The writer of a directory's records, or of a file, and where they stand."""
    if path.is_file():
        if "tfevents" in path.name:
            return "tensorboard", path.parent
        return next(((name, path) for name, told in TELLS.items() if told(path)), None)
    for name, pattern in (("detectron2", "*.json"), ("mmengine", "*.json"), ("lightning", "*.csv")):
        # The documented names first: mmengine writes the same records to a second file.
        for file in sorted(path.glob(pattern), key=lambda p: (p.name not in NAMES, p.name)):
            if TELLS[name](file):
                return name, file
    if any(path.glob("*tfevents*")):
        return "tensorboard", path
    return None


def read(kind: str, path: Path) -> Table:
    """All records. A writer's own name for the step becomes `step`; other names stay."""
    return READERS[kind](path)


def _first(path: Path) -> dict[str, Any]:
    """The first object among a file's first lines, {} where it is no file of JSON lines."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for _ in range(10):  # the first ones may be damaged
                with contextlib.suppress(ValueError):
                    if isinstance(found := json.loads(file.readline(1 << 16)), dict):
                        return found
    except OSError:
        pass
    return {}


def _is_detectron2(path: Path) -> bool:
    return type(_first(path).get("iteration")) is int


def _is_mmengine(path: Path) -> bool:
    return type(_first(path).get("step")) is int and path.suffix == ".json"


def _is_lightning(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            header = file.readline(1 << 16).strip().split(",")
            # `run` stands in what `launcher runs export` wrote.
            return path.suffix == ".csv" and "step" in header and "run" not in header
    except OSError:
        return False


def _objects(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, object), with a Damage for what is none. Python's writers put NaN there."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
                yield number, found if isinstance(found, dict) else Damage(number, "not an object")
            except ValueError as error:
                torn = not line.endswith("\n")
                yield number, Damage(number, "a torn last line" if torn else f"no JSON: {error}")


def _detectron2(path: Path) -> Table:
    """Iterations count from 0 and stay as they are."""
    records, damaged = [], []
    for _, found in _objects(path):
        if isinstance(found, Damage):
            damaged.append(found)
        else:
            records.append(
                {RENAMED.get(k, "step" if k == "iteration" else k): found[k] for k in found}
            )
    table = Table.build(records, range(1, len(records) + 1))
    table.damaged += damaged
    return table


def _mmengine(path: Path) -> Table:
    """Where a run counts epochs, an evaluation's `step` is the epoch: it gets the step of the
    training record before it, so that both have one axis."""
    records, damaged, last = [], [], {}
    for _, found in _objects(path):
        if isinstance(found, Damage):
            damaged.append(found)
            continue
        if "iter" in found:
            last = found
        elif found.get("step") == last.get("epoch") and last:
            found = {**found, "epoch": found["step"], "step": last["step"]}
        records.append({RENAMED.get(k, k): v for k, v in found.items() if k != "iter"})
    table = Table.build(records, range(1, len(records) + 1))
    table.damaged += damaged
    return table


def _lightning(path: Path) -> Table:
    records, lines, damaged = [], [], []
    # NUL bytes, as a full disk leaves them, are an error to csv.
    text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
    rows = csv.reader(text.splitlines(keepends=True))
    header = next(rows, [])
    for row in rows:
        if len(row) != len(header) or (rows.line_num == text.count("\n") + 1):
            damaged.append(Damage(rows.line_num, f"{len(row)} of {len(header)} fields, or torn"))
            continue
        record: dict[str, Any] = {}
        for key, cell in zip(header, row, strict=True):
            try:
                number = float(cell)
            except ValueError:
                continue
            whole = key in ("step", "epoch") and number.is_integer()
            record[key] = int(number) if whole else number
        records.append(record)
        lines.append(rows.line_num)
    table = Table.build(records, lines)
    table.damaged += damaged
    return table


def scalars(directory: Path) -> dict[str, list[np.ndarray]]:
    """tag -> steps, values and wall times of its scalars in the event files, as TensorBoard shows
    them: a file that says from which step on it goes on supersedes what came from there on."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    found: dict[str, list[array]] = {}
    others: set[str] = set()  # tags of images, text, histograms
    for path in sorted(directory.glob("*tfevents*")):
        # A torn end is where the loader stops.
        for raw in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(raw)
            if event.session_log.status == SessionLog.START:
                for tag, points in found.items():
                    kept = [i for i, step in enumerate(points[0]) if step < event.step]
                    found[tag] = [array(p.typecode, [p[i] for i in kept]) for p in points]
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name not in ("", "scalars"):
                    others.add(value.tag)
                if value.tag not in others and (number := _scalar(value)) is not None:
                    points = found.setdefault(value.tag, [array("q"), array("d"), array("d")])
                    points[0].append(event.step)
                    points[1].append(number)
                    points[2].append(event.wall_time)
    return {tag: [np.array(part) for part in points] for tag, points in found.items()}


def _scalar(value: Any) -> float | None:
    """The number in a summary's value, None where it holds something else."""
    if value.WhichOneof("value") == "simple_value":
        return value.simple_value
    if value.WhichOneof("value") != "tensor":
        return None
    if len(value.tensor.float_val) == 1:
        return value.tensor.float_val[0]
    from tensorboard.util.tensor_util import make_ndarray

    found = make_ndarray(value.tensor)
    return float(found.item()) if found.dtype.kind == "f" and found.size == 1 else None


def _tensorboard(directory: Path) -> Table:
    """One record a step. TensorBoard's files have scalars alone, each with its step."""
    tags = {tag: points for tag, points in scalars(directory).items() if len(points[0])}
    every = [
        np.concatenate([np.empty(0), *(points[i] for points in tags.values())]) for i in (0, 2)
    ]
    steps, rows = np.unique(every[0], return_inverse=True)
    position = {name: np.full(len(steps), np.nan) for name in POSITION}
    position["step"] = steps
    np.fmax.at(position["time"], rows, every[1])
    columns = {tag: (np.searchsorted(steps, at), values) for tag, (at, values, _) in tags.items()}
    return Table(position, columns)


NAMES = ("metrics.json", "scalars.json", "metrics.csv")
TELLS: dict[str, Callable[[Path], bool]] = {
    "detectron2": _is_detectron2,
    "mmengine": _is_mmengine,
    "lightning": _is_lightning,
}
READERS: dict[str, Callable[[Path], Table]] = {
    "detectron2": _detectron2,
    "mmengine": _mmengine,
    "lightning": _lightning,
    "tensorboard": _tensorboard,
}
