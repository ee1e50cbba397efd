"""Runs in a terminal: tables, and curves of text."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launcher.runs.index import Series
from launcher.runs.records import Array
from launcher.runs.run import Run, printable
from launcher.telemetry.rundir import POSITION

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
    value = max(value, 0.0)  # clocks differ
    for limit, unit, size in ((100, "s", 1), (6000, "min", 60), (172800, "h", 3600)):
        if value < limit:
            return f"{value / size:.0f} {unit}" if size < 3600 else f"{value / size:.1f} {unit}"
    return f"{value / 86400:.1f} d"


def moment(value: Any) -> str:
    """Unix seconds as local time, nothing for what is none."""
    try:
        return datetime.fromtimestamp(value).isoformat(" ", "seconds")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def cell(column: str, run: Run) -> str:
    """A run's value in a column of `list`."""
    value = run.value(column)
    if column == "step" and run.total_steps:
        return f"{value}/{run.total_steps}"
    if column in ("age", "duration"):
        return seconds(value)
    if column == "epoch" and value is not None:
        return f"{value:.0f}"
    return number(value)


def list_table(runs: Sequence[Run], columns: Sequence[str]) -> Table:
    table = plain_table()
    for place, column in enumerate(columns):
        numeric = column in RIGHT or any(isinstance(run.value(column), float) for run in runs)
        _add_column(table, column, numeric, place == 0)
    for run in runs:
        styles = {"state": STYLES.get(run.state, "")}
        table.add_row(
            *(plain_text(cell(column, run), styles.get(column, "")) for column in columns)
        )
    return table


def show(run: Run, keys: Sequence[str], width: int) -> Group:
    """A run from its state to its environment."""
    parts: list[RenderableType] = [*_headline(run)]
    series = run.summary.series
    losses = [key for key in series if key == "train/loss" or key.startswith("train/loss/")]
    for key in dict.fromkeys(keys or (run.metric, *losses)):
        if key in series and series[key].count > 1:
            parts += [Text(), plain_text(key, "bold"), *map(Text, plot(series[key], width))]
    if series:
        parts += [Text(), _metrics(series, width)]
    if run.history:
        parts += [Text("\nwhat happened", "bold"), _history(run)]
    for title, lines in (("failure", failure_lines(run)), ("environment", environment_lines(run))):
        if lines:
            parts += [Text(f"\n{title}", "bold"), *(plain_text(f"  {line}") for line in lines)]
    return Group(*parts)


def _metrics(series: dict[str, Series], width: int) -> Table:
    table = plain_table("metric", "", "last", "min", "max")
    room = width - 43 - max(map(len, series))
    for key, one in sorted(series.items()):
        known = [point[1] if point else None for point in (one.last, one.min, one.max)]
        table.add_row(plain_text(key), sparkline(one, max(4, min(24, room))), *map(number, known))
    return table


def _headline(run: Run) -> list[Text]:
    head = plain_text(run.path, "bold").append("  ").append(run.state, STYLES.get(run.state, ""))
    if run.status is not None and run.status.reason:
        head.append(f" ({printable(run.status.reason)})")
    if not run.ours:
        head.append(f"  {run.kind}'s records in {run.records.name}")
    epoch = run.summary.last.get("epoch")
    progress = [f"step {run.step} of {run.total_steps}" if run.total_steps else f"step {run.step}"]
    progress += [f"epoch {epoch:.0f}"] if epoch is not None else []
    progress += [f"{run.summary.records} records"]
    progress += [f"{seconds(run.duration)} under way"] if run.duration is not None else []
    lines = [head, Text("  " + ", ".join(progress))]
    if run.updated:
        lines.append(Text(f"  last sign of life {moment(run.updated)}"))
    if best := run.best(run.metric):
        lines.append(plain_text(f"  best {run.metric} {number(best[1])} at step {best[0]:.0f}"))
    return lines


def events(run: Run) -> list[tuple[str, str, str, str]]:
    """What happened: when, what, at which step, and the rest."""
    found = []
    for event in run.history:
        rest = {k: v for k, v in event.items() if k not in ("event", "step", "time")}
        told = "  ".join(f"{key} {number(value)}" for key, value in rest.items())
        step = f"step {event.get('step')}"
        found.append((moment(event.get("time")), str(event.get("event")), step, told))
    return found


def _history(run: Run, most: int = 20) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    told = events(run)
    if len(told) > most:
        table.add_row("", f"... {len(told) - most} earlier")
    for event in told[-most:]:
        table.add_row("", *map(plain_text, event))
    return table


def failure_lines(run: Run) -> list[str]:
    """What failure.json says: short things on a line, a traceback or the end of a log below."""
    lines: list[str] = []
    for key, value in run.failure.items():
        first, *rest = (value if isinstance(value, list) else str(value).rstrip().split("\n")) or [
            ""
        ]
        lines += (
            [f"{key}:", *(f"  {line}" for line in (first, *rest))] if rest else [f"{key}: {first}"]
        )
    return lines


def environment_lines(run: Run) -> list[str]:
    """What environment.json says, a line a thing."""
    return [f"{key}: {_inline(value)}" for key, value in run.environment.items() if value != ""]


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ("; " if any(isinstance(v, dict) for v in value) else " ").join(map(_inline, value))
    return str(value)


def compare_tables(found: dict[str, Any]) -> Group:
    """The tables of `compare.compare`'s outcome."""
    config = plain_table("config", *found["runs"])
    for key, values in found["config"].items():
        config.add_row(plain_text(key), *(plain_text("-" if v is None else v) for v in values))
    metrics = plain_table("metric", "", *found["runs"])
    for row in found["metrics"]:
        cells = [plain_text(number(value)) for value in row["values"]]
        for place in row["best"]:
            cells[place] = cells[place].append(" *")
            cells[place].stylize("bold")
        metrics.add_row(plain_text(row["key"]), row["which"], *cells)
    return Group(config if found["config"] else Text("the configs are equal"), Text(), metrics)


def points_table(found: dict[str, Any]) -> Table:
    """`compare.compare`'s outcome for a sweep: a line a run, which may be many."""
    rows = found["metrics"]
    table = plain_table("run", *found["config"], *(f"{row['key']} {row['which']}" for row in rows))
    for place, run in enumerate(found["runs"]):
        cells = [plain_text(number(values[place])) for values in found["config"].values()]
        for row in rows:
            best = place in row["best"]
            text = number(row["values"][place]) + (" *" if best else "")
            cells.append(Text(text, "bold" if best else ""))
        table.add_row(plain_text(run), *cells)
    return table


def plain_table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        _add_column(table, column, place > 1, place == 0)
    return table


def _add_column(table: Table, name: str, numeric: bool, foldable: bool) -> None:
    """Where there is no room, names are folded; numbers never are."""
    justify: Any = "right" if numeric else "left"
    table.add_column(plain_text(name), justify=justify, overflow="fold", no_wrap=not foldable)


def plain_text(value: Any, style: str = "") -> Text:
    """As it stands: no markup, and nothing that moves a terminal's cursor."""
    return Text(printable(str(value)), style)


def record_line(record: dict[str, Any]) -> str:
    """A record as `tail` prints it."""
    when = moment(record.get("time"))
    parts = [when.partition(" ")[2]] if when else []
    parts += [f"{key} {record[key]}" for key in ("step", "epoch") if key in record]
    for key, value in record.items():
        if key not in (*POSITION, "nonfinite"):
            parts.append(f"{printable(key)} {'nan' if value is None else _short(value)}")
    return "  ".join(parts)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def _columns(series: Series, width: int) -> tuple[Array, Array]:
    """The least and greatest value of a curve in each of `width` equal parts of its steps, scaled
    to 0 to 1; where a part has no point they are interpolated."""
    steps, low, high = series.curve.T
    span = (_end(series) - steps[0]) or 1
    place = np.minimum((steps - steps[0]) / span * width, width - 1).astype(int)
    least, most = np.full(width, np.inf), np.full(width, -np.inf)
    np.minimum.at(least, place, low)
    np.maximum.at(most, place, high)
    have, every = np.flatnonzero(np.isfinite(least)), np.arange(width)
    bottom = low.min() / 2  # of halves, since no float is 2e308
    span = (high.max() / 2 - bottom) or 1
    least, most = ((found[have] / 2 - bottom) / span for found in (least, most))
    return np.interp(every, have, least), np.interp(every, have, most)


def _end(series: Series) -> float:
    return series.last[0] if series.last else 0.0


def sparkline(series: Series, width: int) -> str:
    """A curve on one line."""
    if not len(series.curve):
        return ""
    low, high = _columns(series, min(width, len(series.curve)))
    return "".join(BARS[min(7, int(value * 8))] for value in (low + high) / 2)


def plot(series: Series, width: int, height: int = 8) -> list[str]:
    """A curve in braille, two by four dots a character, with its scale."""
    labels = [number(float(series.curve[:, 2].max())), number(float(series.curve[:, 1].min()))]
    margin = max(map(len, labels)) + 1
    columns = max(10, min(72, width - margin - 1))
    last = 4 * height - 1
    bottom, top = (last - (v * last).round().astype(int) for v in _columns(series, 2 * columns))
    dots = np.zeros((4 * height, 2 * columns), bool)
    for x in range(2 * columns):
        # Down or up to where the column before ends, so that steep parts are lines as well.
        before = max(x - 1, 0)
        dots[min(top[x], bottom[before]) : max(bottom[x], top[before]) + 1, x] = True
    weights = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    cells = dots.reshape(height, 4, columns, 2).transpose(0, 2, 1, 3)
    codes = 0x2800 + (cells * weights).sum(axis=(2, 3))
    labels[1:1] = [""] * (height - 2)
    lines = [
        f"{label:>{margin}} " + "".join(map(chr, row)).rstrip("\u2800")
        for label, row in zip(labels, codes, strict=True)
    ]
    start, end = f"{series.curve[0, 0]:.0f}", f"{_end(series):.0f}"
    return [*lines, " " * (margin + 1) + start + f"step {end}".rjust(columns - len(start))]
