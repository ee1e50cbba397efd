"""Runs of other programs as records, recognised by what stands in their files.

detectron2's metrics.json, mmengine's scalars.json, Lightning's metrics.csv, TensorBoard's events.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from launcher.runs.records import Damage, Table, objects
from launcher.telemetry.rundir import POSITION

# Both mean seconds by them, not a moment as `time` does in our records.
RENAMED = {"time": "perf/step_s", "data_time": "perf/data_s"}
DOCUMENTED = ("metrics.json", "scalars.json", "metrics.csv")
TRIED = 16  # most files of a directory that are looked into: it may be one of a million labels
LINE = 1 << 16  # a longer line is no record


def recognise(path: Path) -> tuple[str, Path] | None:
    """The writer of a directory's records, or of a file, and where they stand."""
    if path.is_file():
        if "tfevents" in path.name:
            return "tensorboard", path.parent
        kind = _kind(path)
        return (kind, path) if kind else None
    try:
        names = os.listdir(path)
    except OSError:
        return None
    # The documented names first: mmengine writes the same records to a second file.
    tried = [name for name in names if name.endswith((".json", ".csv"))]
    tried.sort(key=lambda name: (name not in DOCUMENTED, name))
    for file in (path / name for name in tried[:TRIED]):
        if file.is_file() and (kind := _kind(file)):
            return kind, file
    return ("tensorboard", path) if any("tfevents" in name for name in names) else None


def _kind(path: Path) -> str | None:
    """Who wrote a text file, by its first lines."""
    try:
        with path.open("rb") as file:
            start = [file.readline(LINE) for _ in range(10)]  # the first ones may be damaged
    except OSError:
        return None
    if path.suffix == ".csv":
        header = start[0].decode(errors="replace").strip().split(",")
        # `run` stands in what `launcher runs export` wrote.
        return "lightning" if "step" in header and "run" not in header else None
    found = [one for _, one in objects(start, _loads) if isinstance(one, dict)]
    if found and type(found[0].get("iteration")) is int:
        return "detectron2"
    if found and type(found[0].get("step")) is int and path.suffix == ".json":
        return "mmengine"
    return None


def read(kind: str, path: Path) -> Table:
    """All records. A writer's own name for the step becomes `step`; other names stay."""
    return READERS[kind](path)


def _loads(line: bytes) -> Any:
    """As Python's writers put it down, with NaN and infinity."""
    return json.loads(line, parse_int=lambda digits: int(digits) if len(digits) < 19 else None)


def _detectron2(path: Path) -> Table:
    """Iterations count from 0 and stay as they are."""
    with path.open("rb") as file:
        return Table.build(_renamed(objects(file, _loads), {"iteration": "step"}))


def _mmengine(path: Path) -> Table:
    with path.open("rb") as file:
        return Table.build(_renamed(_on_one_axis(objects(file, _loads)), {}))


def _on_one_axis(lines: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Where a run counts epochs, an evaluation's `step` is the epoch: it gets the step of the
    training record before it."""
    last: dict[str, Any] = {}
    for number, found in lines:
        if isinstance(found, dict):
            if "iter" in found:
                last = found
                found.pop("iter")
            elif last and found.get("step") == last.get("epoch"):
                found |= {"epoch": found["step"], "step": last["step"]}
        yield number, found


def _renamed(lines: Iterable[tuple[int, Any]], more: dict[str, str]) -> Iterator[tuple[int, Any]]:
    names = RENAMED | more
    for number, found in lines:
        if isinstance(found, dict):
            found = {names.get(key, key): value for key, value in found.items()}
        yield number, found


def _lightning(path: Path) -> Table:
    # NUL bytes, as a full disk leaves them, are an error to csv.
    text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
    return Table.build(_rows(text))


def _rows(text: str) -> Iterator[tuple[int, Any]]:
    rows = csv.reader(text.splitlines(keepends=True))
    header = next(rows, [])
    for row in rows:
        line = rows.line_num
        if len(row) != len(header) or line > text.count("\n"):
            yield line, Damage(line, f"{len(row)} of {len(header)} fields, or torn")
            continue
        record: dict[str, Any] = {}
        for key, cell in zip(header, row, strict=True):
            with contextlib.suppress(ValueError):
                number = float(cell)
                whole = key in ("step", "epoch") and number.is_integer()
                record[key] = int(number) if whole else number
        yield line, record


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
                    for column, one in zip(
                        points, (event.step, number, event.wall_time), strict=True
                    ):
                        column.append(one)
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
    every, times = (
        np.concatenate([np.empty(0), *(points[i] for points in tags.values())]) for i in (0, 2)
    )
    steps, rows = np.unique(every, return_inverse=True)
    position = {name: np.full(len(steps), np.nan) for name in POSITION}
    position["step"] = steps
    np.fmax.at(position["time"], rows, times)
    columns = {tag: (np.searchsorted(steps, at), values) for tag, (at, values, _) in tags.items()}
    return Table(position, columns)


READERS: dict[str, Callable[[Path], Table]] = {
    "detectron2": _detectron2,
    "mmengine": _mmengine,
    "lightning": _lightning,
    "tensorboard": _tensorboard,
}
