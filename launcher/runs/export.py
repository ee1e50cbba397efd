"""Records of runs as one table in a file: a row a record, with the run's name in front."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from launcher.errors import UsageError
from launcher.runs.records import Table
from launcher.runs.run import Run
from launcher.telemetry.rundir import POSITION

WHOLE = ("step", "epoch", "samples")
ROWS = 20_000  # made at once

Row = dict[str, Any]


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
        rows = ({"run": run.name, **row} for run in runs for row in _rows(run.table().in_order()))
        count = writers[output.suffix](rows, ["run", *POSITION, *keys], temporary)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _rows(table: Table) -> Iterator[Row]:
    """The records by step, but those of which nothing is left: a resume superseded them."""
    steps = table.position["step"]
    order = np.unique(np.concatenate([np.empty(0, int), *(r for r, _ in table.columns.values())]))
    order = order[np.argsort(steps[order], kind="stable")]
    place = np.zeros(len(table), int)
    place[order] = np.arange(len(order))  # row of the table -> row of the file
    columns = {key: (place[rows], values) for key, (rows, values) in table.columns.items()}
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        found: list[Row] = [{} for _ in chosen]
        for name in POSITION:
            for row, value in zip(found, table.position[name][chosen].tolist(), strict=True):
                if value == value:
                    row[name] = int(value) if name in WHOLE else value
        for key, (places, values) in columns.items():
            here = (places >= start) & (places < start + ROWS)
            for at, value in zip(
                (places[here] - start).tolist(), values[here].tolist(), strict=True
            ):
                found[at][key] = value
        yield from found


def _csv(rows: Iterator[Row], columns: list[str], path: Path) -> int:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        count = 0
        for row in rows:
            writer.writerow({k: "NaN" if v != v else v for k, v in row.items()})
            count += 1
    return count


def _jsonl(rows: Iterator[Row], columns: list[str], path: Path) -> int:
    with path.open("wb") as file:
        count = 0
        for row in rows:
            file.write(orjson.dumps(row) + b"\n")  # NaN becomes null
            count += 1
    return count


def _parquet(rows: Iterator[Row], columns: list[str], path: Path) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError("pip install 'launcher[export]' for .parquet") from error
    types = {"run": pa.string(), **{name: pa.int64() for name in WHOLE}}
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in columns])
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        while batch := list(islice(rows, ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            count += len(batch)
    return count
