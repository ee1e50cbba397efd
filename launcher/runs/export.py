"""Records of runs as one table in a file: a row a record, with the run's name in front."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from launcher.errors import UsageError
from launcher.runs.records import POSITION, Array, Table
from launcher.runs.run import Run

WHOLE = ("step", "epoch", "samples")
ROWS = 20_000  # written at once


def export(runs: Sequence[Run], output: Path) -> int:
    """Write CSV, Parquet or JSON lines, by the name's ending; returns how many rows.

    A null (NaN or infinity when it was recorded) is null in JSON lines and NaN elsewhere; what a
    record does not have is left out, or empty. The file is there whole or not at all.
    """
    writers = {".csv": _csv, ".parquet": _parquet, ".jsonl": _jsonl}
    if output.suffix not in writers:
        raise UsageError(f"-o {output}: the name must end in .csv, .parquet or .jsonl")
    keys = sorted({key for run in runs for key in run.summary.series})
    if clash := {"run", *POSITION} & set(keys):
        raise UsageError(f"the metrics {', '.join(sorted(clash))} would hide columns of that name")
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        rows = writers[output.suffix](runs, keys, temporary)
        temporary.replace(output)
    except OSError as error:
        raise UsageError(f"-o {output}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return rows


def _csv(runs: Sequence[Run], keys: list[str], path: Path) -> int:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *POSITION, *keys])
        count = 0
        for name, columns in _blocks(runs, keys):
            lists = [columns[key] for key in (*POSITION, *keys)]
            for row in zip(*lists, strict=True):
                writer.writerow([name, *("NaN" if v is not None and v != v else v for v in row)])
            count += len(columns["step"])
    return count


def _jsonl(runs: Sequence[Run], keys: list[str], path: Path) -> int:
    with path.open("wb") as file:
        count = 0
        for name, columns in _blocks(runs, keys):
            names, lists = list(columns), list(columns.values())
            for row in zip(*lists, strict=True):
                pairs = zip(names, row, strict=True)
                record = {"run": name, **{k: v for k, v in pairs if v is not None}}
                file.write(orjson.dumps(record) + b"\n")  # NaN becomes null
            count += len(columns["step"])
    return count


def _parquet(runs: Sequence[Run], keys: list[str], path: Path) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError("pip install 'launcher[export]' for .parquet") from error
    types: dict[str, Any] = {"run": pa.string(), **{name: pa.int64() for name in WHOLE}}
    types |= {"time": pa.float64(), **{key: pa.float64() for key in keys}}
    schema = pa.schema(list(types.items()))
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        for name, columns in _blocks(runs, keys):
            names = [name] * len(columns["step"])
            writer.write_table(pa.table({"run": names, **columns}, schema=schema))
            count += len(names)
    return count


def _blocks(runs: Sequence[Run], keys: list[str]) -> Iterator[tuple[str, dict[str, list[Any]]]]:
    """Columns of at most ROWS records of one run at a time, None where a record has no value."""
    for run in runs:
        table = run.table()
        latest = {key: table.latest(key) for key in keys}
        order = _order(table, latest)
        place = np.full(len(table), -1)  # row of the table -> row of the file
        place[order] = np.arange(len(order))
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            columns = {name: _known(table.position[name][rows], name in WHOLE) for name in POSITION}
            for key, (at, values) in latest.items():
                here = (place[at] >= start) & (place[at] < start + len(rows))
                cells: list[Any] = [None] * len(rows)
                for row, value in zip(place[at][here] - start, values[here].tolist(), strict=True):
                    cells[row] = value
                columns[key] = cells
            yield run.name, columns


def _order(table: Table, latest: dict[str, tuple[Array, Array]]) -> Array:
    """The rows that count, in order of their steps: those that a resume superseded do not."""
    if all(len(table.columns[key][0]) == len(latest[key][0]) for key in table.columns):
        return np.arange(len(table))
    rows = np.unique(np.concatenate([rows for rows, _ in latest.values()]))
    return rows[np.argsort(table.position["step"][rows], kind="stable")]


def _known(values: Array, whole: bool) -> list[Any]:
    return [None if v != v else int(v) if whole else v for v in values.tolist()]
