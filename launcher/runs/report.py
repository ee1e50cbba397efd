"""One page about runs: curves to zoom into, differences, history. It needs nothing beside it."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from launcher.runs.compare import compare
from launcher.runs.plot import hours, thin
from launcher.runs.records import Array, Table
from launcher.runs.run import Run
from launcher.runs.terminal import (
    cell,
    environment_lines,
    events,
    failure_lines,
    moment,
    number,
)

TEMPLATE = Path(__file__).with_name("report.html")


def report(runs: Sequence[Run]) -> str:
    """The page, as HTML."""
    found = compare(runs)
    parts = {
        "title": escape(", ".join(found["runs"])),
        "summary": _summary(runs),
        "body": _differences(found) + "".join(map(_about, runs)),
        # Nothing in it may end the script element.
        "data": orjson.dumps(_data(runs, found["runs"])).decode().replace("<", "\\u003c"),
    }
    # In one pass: a run may be called {{data}}.
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _data(runs: Sequence[Run], names: list[str]) -> dict[str, Any]:
    curves: dict[str, list[dict[str, Any]]] = {}
    for place, run in enumerate(runs):
        table = run.table().in_order()
        for key in table.columns:
            curves.setdefault(key, []).append({"run": place, **_curve(table, key)})
    order = {"val": 0, "train": 1}  # what people look at first
    keys = sorted(curves, key=lambda key: (order.get(key.partition("/")[0], 2), key))
    return {"runs": names, "curves": {key: curves[key] for key in keys}}


def _curve(table: Table, key: str) -> dict[str, Any]:
    """A metric over steps, samples and hours."""
    rows, values = table.columns[key]
    kept = thin(values)
    rows, values = rows[kept], values[kept]
    axes = {name: table.position[name][rows] for name in ("step", "samples")}
    axes["time"] = hours(table)[rows]
    known = {name: _list(at) for name, at in axes.items() if not np.isnan(at).all()}
    return {**known, "values": _list(values)}


def _list(values: Array) -> list[float | None]:
    return [v if np.isfinite(v) else None for v in values.tolist()]


def _summary(runs: Sequence[Run]) -> str:
    names = ("run", "state", "step", "metric", "best", "last", "duration")
    rows = [[*(cell(name, run) for name in names), moment(run.updated)] for run in runs]
    return _table((*names, "last sign of life"), rows)


def _differences(found: dict[str, Any]) -> str:
    metrics = [
        [row["key"], row["which"], *(number(v) for v in row["values"])] for row in found["metrics"]
    ]
    best = {(at, 2 + place) for at, row in enumerate(found["metrics"]) for place in row["best"]}
    config = [
        [key, *("-" if v is None else v for v in values)] for key, values in found["config"].items()
    ]
    text = "<h2>Metrics</h2>" + _table(("metric", "", *found["runs"]), metrics, best)
    if config:
        text += "<h2>Config keys that differ</h2>" + _table(("key", *found["runs"]), config)
    return text


def _about(run: Run) -> str:
    """History, environment, failure and config of one run."""
    text = f"<h2>{escape(run.name)}</h2>"
    if run.failure:
        told = escape("\n".join(failure_lines(run)))
        text += f"<h3>Failure</h3><pre>{told}</pre>"
    if run.history:
        table = _table(("time", "event", "", ""), events(run))
        text += f"<details open><summary>What happened</summary>{table}</details>"
    for title, block in (
        ("Environment", environment_lines(run)),
        ("Config", [f"{key}: {value}" for key, value in run.config.items()]),
        ("Lines that could not be read", run.damaged),
    ):
        if block:
            told = escape("\n".join(block))
            text += f"<details><summary>{title}</summary><pre>{told}</pre></details>"
    return text


def _table(
    head: Iterable[str], rows: Iterable[Sequence[Any]], best: Container[tuple[int, int]] = ()
) -> str:
    """Rows of text; those cells stand out whose (row, column) is among `best`."""
    lines = "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"
    for at, row in enumerate(rows):
        lines += "<tr>"
        for place, value in enumerate(row):
            kind = ' class="best"' if (at, place) in best else ""
            lines += f"<td{kind}>{escape(str(value))}</td>"
        lines += "</tr>"
    return f'<div class="wide"><table>{lines}</table></div>'
