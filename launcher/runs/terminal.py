"""Runs in a terminal: tables, and curves of text."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from launcher.runs.index import Series
from launcher.runs.records import Array
from launcher.runs.run import Run

BARS = "▁▂▃▄▅▆▇█"
STYLES = {"completed": "green", "running": "cyan", "failed": "red", "lost": "red"}
RIGHT = ("best", "last", "step", "age", "duration", "records", "epoch", "total")


def number(value: Any) -> str:
    """A value in a table: six digits, nothing for None."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def seconds(value: float | None) -> str:
    """A time span: 43 s, 12 min, 3.5 h, 2.1 d."""
    if value is None:
        return ""
    for limit, unit, size in ((100, "s", 1), (6000, "min", 60), (172800, "h", 3600)):
        if value < limit:
            return f"{value / size:.0f} {unit}" if size < 3600 else f"{value / size:.1f} {unit}"
    return f"{value / 86400:.1f} d"


def moment(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return ""
    return datetime.fromtimestamp(value).isoformat(" ", "seconds")


def cell(column: str, run: Run) -> str:
    """A run's value in a column of `list`."""
    value = run.value(column)
    if column == "step":
        total = run.total_steps
        return f"{value}/{total}" if total else f"{value}"
    if column in ("age", "duration"):
        return seconds(value)
    if column == "epoch" and value is not None:
        return f"{value:.0f}"
    return number(value)


def list_table(runs: Sequence[Run], columns: Sequence[str]) -> Table:
    table = _table()
    for column in columns:
        numeric = column in RIGHT or any(isinstance(run.value(column), float) for run in runs)
        table.add_column(escape(column), justify="right" if numeric else "left", overflow="fold")
    for run in runs:
        cells = [Text(cell(column, run)) for column in columns]
        if "state" in columns:
            cells[columns.index("state")].stylize(STYLES.get(run.state, ""))
        table.add_row(*cells)
    return table


def show(run: Run, keys: Sequence[str], width: int) -> Group:
    """A run from its state to its environment."""
    parts: list[RenderableType] = [*_headline(run)]
    summary = run.summary
    known = [key for key in keys or (run.metric, "train/loss") if key in summary.series]
    for key in dict.fromkeys(known):
        if summary.series[key].count > 1:
            parts += [Text(), Text(key, "bold"), *map(Text, plot(summary.series[key], width))]
    table = _table("metric", "", *("last", "min", "at step", "max", "at step"))
    room = width - 64 - max(map(len, summary.series), default=0)
    for key, series in sorted(summary.series.items()):
        row = [number(series.last[1] if series.last else None)]
        for extreme in (series.min, series.max):
            row += [number(extreme[1]), number(int(extreme[0]))] if extreme else ["", ""]
        table.add_row(escape(key), sparkline(series, max(4, min(24, room))), *row)
    parts += [Text(), table] if summary.series else []
    if run.history:
        parts += [Text("\nwhat happened", "bold"), history_table(run.history)]
    if run.failure:
        parts.append(Text("\nfailure", "bold red"))
        parts += [Text(f"  {key}: {value}") for key, value in run.failure.items()]
    if environment := environment_lines(run):
        parts += [Text("\nenvironment", "bold"), *(Text(f"  {line}") for line in environment)]
    return Group(*parts)


def _headline(run: Run) -> list[Text]:
    step, total = run.step, run.total_steps
    head = Text.assemble((str(run.path), "bold"), "  ", (run.state, STYLES.get(run.state, "")))
    if run.status is not None and run.status.reason:
        head.append(f" ({run.status.reason})")
    if not run.ours:
        head.append(f"  {run.kind}'s records in {run.records.name}")
    epoch = run.summary.last.get("epoch")
    progress = [f"step {step} of {total}" if total else f"step {step}"]
    progress += [f"epoch {epoch:.0f}"] if epoch is not None else []
    progress += [f"{run.summary.records} records"]
    progress += [f"last sign of life {moment(run.updated)}"] if run.updated else []
    progress += [f"{seconds(run.duration)} under way"] if run.duration is not None else []
    lines = [head, Text("  " + ", ".join(progress))]
    if best := run.best(run.metric):
        lines.append(Text(f"  best {run.metric} {number(best[1])} at step {best[0]:.0f}"))
    return lines


def history_table(history: Sequence[dict[str, Any]], most: int = 20) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    if len(history) > most:
        table.add_row("", f"... {len(history) - most} earlier", "", "")
    for event in history[-most:]:
        rest = {k: v for k, v in event.items() if k not in ("event", "step", "time")}
        told = "  ".join(f"{key} {number(value)}" for key, value in rest.items())
        cells = (moment(event.get("time")), str(event.get("event")), f"step {event.get('step')}")
        table.add_row(*(Text(part) for part in ("", *cells, told)))
    return table


def environment_lines(run: Run) -> list[str]:
    """What environment.json says, a line a thing."""
    found = run.environment
    lines = []
    if isinstance(command := found.get("command"), list):
        lines.append("command: " + " ".join(map(str, command)))
    if isinstance(versions := found.get("versions"), dict):
        lines.append("versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    if isinstance(git := found.get("git"), dict):
        lines.append(f"git: {git.get('commit')}{' with changes' if git.get('dirty') else ''}")
    if isinstance(ranks := found.get("ranks"), list):
        told = [f"{r.get('host')} {r.get('device')}" for r in ranks if isinstance(r, dict)]
        lines.append(f"{len(ranks)} ranks: " + ", ".join(told))
    if isinstance(cpu := found.get("cpu"), dict):
        lines.append(f"CPUs: {cpu.get('usable')} usable ({cpu.get('reason')})")
    return lines


def compare_tables(found: dict[str, Any]) -> Group:
    """The tables of `compare.compare`'s outcome."""
    names = found["runs"]
    config = _table("config", *names)
    for key, values in found["config"].items():
        config.add_row(escape(key), *(Text("-" if v is None else str(v)) for v in values))
    metrics = _table("metric", "", *names)
    for row in found["metrics"]:
        marked = [
            Text(
                f"{number(v)} *" if i in row["best"] else number(v),
                "bold" if i in row["best"] else "",
            )
            for i, v in enumerate(row["values"])
        ]
        metrics.add_row(escape(row["key"]), row["which"], *marked)
    parts: list[RenderableType] = [config] if found["config"] else [Text("the configs are equal")]
    return Group(*parts, Text(), metrics)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(
            escape(column),
            justify="left" if place < 2 else "right",
            overflow="fold",
            no_wrap=place == 1,
        )
    return table


def record_line(record: dict[str, Any]) -> str:
    """A record as `tail` prints it."""
    when = record.get("time")
    parts = [datetime.fromtimestamp(when).strftime("%H:%M:%S")] if isinstance(when, float) else []
    parts += [f"{key} {record[key]}" for key in ("step", "epoch") if key in record]
    for key, value in record.items():
        if key not in ("step", "epoch", "samples", "time", "nonfinite"):
            text = f"{value:.4g}" if isinstance(value, (int, float)) else "nan"
            parts.append(f"{key} {text}")
    return "  ".join(parts)


def columns_of(series: Series, width: int) -> tuple[Array, Array]:
    """The least and greatest value of a curve in each of `width` equal parts of its steps, those
    between its points interpolated."""
    curve = series.curve
    start, end = curve[0, 0], curve[-1, 1]
    place = np.minimum((curve[:, 0] - start) / ((end - start) or 1) * width, width - 1).astype(int)
    low, high = np.full(width, np.inf), np.full(width, -np.inf)
    np.minimum.at(low, place, curve[:, 3])
    np.maximum.at(high, place, curve[:, 4])
    have = np.flatnonzero(np.isfinite(low))
    every = np.arange(width)
    return np.interp(every, have, low[have]), np.interp(every, have, high[have])


def sparkline(series: Series, width: int) -> str:
    """A curve on one line."""
    if not len(series.curve):
        return ""
    low, high = columns_of(series, min(width, max(1, len(series.curve))))
    middle = (low + high) / 2
    span = np.ptp(middle)
    scaled = (middle - middle.min()) / span if span else np.zeros(len(middle))
    return "".join(BARS[min(7, int(value * 8))] for value in scaled)


def plot(series: Series, width: int, height: int = 8) -> list[str]:
    """A curve in braille, two by four dots a character, with its scale."""
    labels = [number(series.max[1]), number(series.min[1])] if series.max and series.min else []
    margin = max(map(len, labels), default=0) + 1
    columns = max(10, min(72, width - margin - 2))
    low, high = columns_of(series, 2 * columns)
    least, most = low.min(), high.max()
    rows = 4 * height
    scale = (rows - 1) / ((most - least) or 1)
    bottom, top = (rows - 1 - ((v - least) * scale).round().astype(int) for v in (low, high))
    dots = np.zeros((rows, 2 * columns), bool)
    for x in range(2 * columns):
        # Down or up to where the column before ends, so that steep parts are lines as well.
        above = max(top[x], 0) if x == 0 else min(top[x], bottom[x - 1])
        below = bottom[x] if x == 0 else max(bottom[x], top[x - 1])
        dots[above : below + 1, x] = True
    weights = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    cells = dots.reshape(height, 4, columns, 2).transpose(0, 2, 1, 3)
    codes = 0x2800 + (cells * weights).sum(axis=(2, 3))
    lines = []
    for row in range(height):
        label = labels[0] if row == 0 else labels[1] if row == height - 1 else ""
        lines.append(f"{label:>{margin}} " + "".join(map(chr, codes[row])).rstrip("⠀"))
    start, end = f"{series.curve[0, 0]:.0f}", f"{series.curve[-1, 1]:.0f}"
    lines.append(" " * (margin + 1) + start + f"step {end}".rjust(columns - len(start)))
    return lines
