"""One page about runs: curves to zoom into, differences, history. It needs nothing beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from launcher.runs.compare import compare
from launcher.runs.records import Array, Table
from launcher.runs.run import Run
from launcher.runs.terminal import environment_lines, moment, number, seconds

TEMPLATE = Path(__file__).with_name("report.html")
POINTS = 2000  # most points of a curve in the page


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
        table = run.table()
        for key in table.columns:
            curves.setdefault(key, []).append({"run": place, **_curve(table, key)})
    order = {"val": 0, "train": 1}  # what people look at first
    keys = sorted(curves, key=lambda key: (order.get(key.partition("/")[0], 2), key))
    return {"runs": names, "curves": {key: curves[key] for key in keys}}


def _curve(table: Table, key: str) -> dict[str, Any]:
    """A metric over steps, samples and hours, by as many points as a page can hold: of each part of
    a longer curve the least and the greatest value."""
    rows, values = table.latest(key)
    if len(values) > POINTS:
        parts = np.array_split(np.arange(len(values)), POINTS // 2)
        filled = np.where(np.isnan(values), np.inf, values)
        least = [part[filled[part].argmin()] for part in parts]
        most = [part[np.where(np.isnan(values), -np.inf, values)[part].argmax()] for part in parts]
        kept = np.unique(np.concatenate([[0], least, most, [len(values) - 1]]))
        rows, values = rows[kept], values[kept]
    start = np.nanmin(table.position["time"]) if len(table) else np.nan
    axes = {
        "step": table.position["step"][rows],
        "samples": table.position["samples"][rows],
        "time": (table.position["time"][rows] - start) / 3600,
    }
    known = {name: _list(at) for name, at in axes.items() if not np.isnan(at).all()}
    return {**known, "values": _list(values)}


def _list(values: Array) -> list[float | None]:
    return [v if np.isfinite(v) else None for v in values.tolist()]


def _summary(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        total = run.total_steps
        best = run.best(run.metric)
        rows.append(
            [
                run.name,
                run.state,
                f"{run.step} of {total}" if total else str(run.step),
                run.metric,
                f"{number(best[1])} at step {best[0]:.0f}" if best else "",
                number(run.value(run.metric)),
                seconds(run.duration),
                moment(run.updated),
            ]
        )
    head = ("run", "state", "step", "metric", "best", "last", "under way", "last sign of life")
    return _table(head, [[_cell(value) for value in row] for row in rows])


def _differences(found: dict[str, Any]) -> str:
    config = [
        [_cell(key), *(_cell("-" if v is None else v) for v in values)]
        for key, values in found["config"].items()
    ]
    metrics = [
        [
            _cell(row["key"]),
            _cell(row["which"]),
            *(
                _cell(number(value), "n best" if place in row["best"] else "n")
                for place, value in enumerate(row["values"])
            ),
        ]
        for row in found["metrics"]
    ]
    text = "<h2>Metrics</h2>" + _table(("metric", "", *found["runs"]), metrics)
    if config:
        text += "<h2>Config keys that differ</h2>" + _table(("key", *found["runs"]), config)
    return text


def _about(run: Run) -> str:
    """History, environment, failure and config of one run."""
    text = f"<h2>{escape(run.name)}</h2>"
    if run.failure:
        lines = "\n".join(f"{key}: {value}" for key, value in run.failure.items())
        text += f"<h3>Failure</h3><pre>{escape(lines)}</pre>"
    events = []
    for event in run.history:
        rest = {k: v for k, v in event.items() if k not in ("event", "step", "time")}
        told = ", ".join(f"{key} {number(value)}" for key, value in rest.items())
        cells = (moment(event.get("time")), event.get("event"), event.get("step"), told)
        events.append([_cell(value) for value in cells])
    if events:
        table = _table(("time", "event", "step", ""), events)
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


def _cell(value: Any, kind: str = "") -> str:
    return (
        f'<td class="{kind}">{escape(str(value))}</td>'
        if kind
        else f"<td>{escape(str(value))}</td>"
    )


def _table(head: Iterable[str], rows: Iterable[list[str]]) -> str:
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{names}</tr>{lines}</table></div>'
