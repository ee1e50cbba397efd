"""Tables of records: a row a record, read back by other programs."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from launcher.errors import UsageError
from launcher.runs import export as module
from launcher.runs.export import export
from launcher.runs.run import Run, open_runs
from tests.runs.made import lines, make_run, record, training


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    odd = [record(1, loss=None, **{"a,b": 1.0}), record(2, loss=0.5)]
    return open_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", odd)])


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows as a program sees them that has read the file."""
    if file.suffix == ".parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(file).to_pylist()
        return [{k: v for k, v in row.items() if v is not None} for row in table]
    lines = file.read_text().splitlines()
    if file.suffix == ".jsonl":
        found = map(orjson.loads, lines)  # refuses NaN
        return [{k: math.nan if v is None else v for k, v in row.items()} for row in found]
    cells = [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(lines)]
    return [{k: v if k == "run" else float(v) for k, v in row.items()} for row in cells]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("block", [1, 3, 20_000])
def test_export(
    suffix: str, block: int, runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every record in order, each value once; NaN is NaN, what is not there is not there."""
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(module, "ROWS", block)
    file = tmp_path / f"all.{suffix}"
    assert export(runs, file) == 14
    found = rows_of(file)
    assert found[:12] == [{"run": "a", **one} for one in training(100)]
    first, second = found[12:]
    assert math.isnan(first.pop("loss"))
    assert first == {"run": "b", **record(1), "a,b": 1.0}
    assert second == {"run": "b", **record(2, loss=0.5)}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_parquet_has_whole_steps(runs: list[Run], tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    export(runs, tmp_path / "all.parquet")
    types = {field.name: str(field.type) for field in pq.read_schema(tmp_path / "all.parquet")}
    assert types["step"] == "int64" and types["time"] == types["a,b"] == "double"


def test_superseded_records_are_left_out(tmp_path: Path) -> None:
    path, file = tmp_path / "metrics.json", tmp_path / "all.csv"
    losses = ((19, 1.0), (39, 2.0), (59, 3.0), (39, 9.0))
    path.write_text(lines([{"iteration": step, "loss": loss} for step, loss in losses]))
    assert export(open_runs([path]), file) == 3
    assert [(r["step"], r["loss"]) for r in rows_of(file)] == [(19, 1.0), (39, 9.0), (59, 3.0)]


def test_what_cannot_be_exported(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="must end in"):
        export(runs, tmp_path / "all.xlsx")
    named = open_runs([make_run(tmp_path / "c", [record(1, run=1.0)])])
    with pytest.raises(UsageError, match="the metrics run would hide"):
        export(named, tmp_path / "all.csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'launcher\[export\]'"):
        export(runs, tmp_path / "all.parquet")
