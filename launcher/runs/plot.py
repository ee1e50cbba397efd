"""Curves of runs as a picture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launcher.errors import UsageError
from launcher.runs.records import Array, Table
from launcher.runs.run import Run

POINTS = 2000  # most points of a curve that are drawn
AXES = {"step": "step", "samples": "samples", "time": "hours since the first record"}


def smooth(values: Array, weight: float) -> Array:
    """TensorBoard's smoothing: an exponential moving average, divided by what the values so far
    weigh, so that the start is not drawn to zero. NaN and infinity stay and count for nothing."""
    if not weight:
        return values
    out = values.copy()
    average, debias = 0.0, 0.0
    for place in np.flatnonzero(np.isfinite(values)):
        average = weight * average + (1 - weight) * values[place]
        debias = weight * debias + (1 - weight)
        out[place] = average / debias
    return out


def thin(values: Array) -> Array:
    """The places of the values that make the same picture: of each part of a long curve the least
    and the greatest."""
    places = np.arange(len(values))
    if len(values) <= POINTS:
        return places
    kept = [places[:1], places[-1:]]
    for part in np.array_split(places, POINTS // 2):
        finite = part[np.isfinite(values[part])]
        for find in (np.argmin, np.argmax) if len(finite) else ():
            kept.append(finite[[find(values[finite])]])
    return np.unique(np.concatenate(kept))


def hours(table: Table) -> Array:
    """Since the first record; NaN where a record has no time."""
    time = table.position["time"]
    return (time - np.nanmin(time)) / 3600 if np.isfinite(time).any() else time


@contextlib.contextmanager
def picture(titles: Sequence[str], below: str, output: Path) -> Iterator[Any]:
    """The axes of so many panels, one below the other, to draw on; written at the end. Raises
    UsageError where there is nothing to draw with."""
    if output.suffix not in (".png", ".svg"):
        raise UsageError(f"-o {output}: the name must end in .png or .svg")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("pip install 'launcher[plot]' to plot") from error

    # Text as text: it can be searched, and looks like the page around it.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "launcher"}):
        figure = Figure(figsize=(8, 1 + 3 * len(titles)), layout="constrained")
        panels = figure.subplots(len(titles), squeeze=False)[:, 0]
        yield panels
        for title, axes in zip(titles, panels, strict=True):
            axes.set_title(title, loc="left", parse_math=False)
            axes.grid(alpha=0.3)
            axes.margins(x=0.01)
        panels[-1].set_xlabel(below)
        undated = {"Date": None} if output.suffix == ".svg" else None
        figure.savefig(output, dpi=120, metadata=undated)


def plot(runs: Sequence[Run], keys: Sequence[str], x: str, smoothing: float, output: Path) -> None:
    """Draw a panel a key with a curve a run, the values themselves faint behind smoothed ones.

    Raises UsageError where there is nothing to draw, or nothing to draw it with.
    """
    with picture(keys, AXES[x], output) as panels:
        drawn: set[str] = set()
        for number, run in enumerate(runs):
            table, color = run.table().in_order(), f"C{number % 10}"
            table.position["time"] = hours(table)
            # matplotlib hides labels that begin with _, and takes what is between two $ for maths.
            label = f" {run.name}".replace("$", r"\$")
            for key, axes in zip(keys, panels, strict=True):
                at, values = table.series(key, x)
                if not len(values) or np.isnan(at).all():
                    continue
                if smoothing:
                    kept = thin(values)
                    axes.plot(at[kept], values[kept], color=color, alpha=0.25, linewidth=1)
                smoothed = smooth(values, smoothing)
                kept, marker = thin(smoothed), "o" if len(values) == 1 else None
                axes.plot(at[kept], smoothed[kept], color=color, label=label, marker=marker)
                drawn.add(key)
        if missing := [key for key in keys if key not in drawn]:
            known = sorted({key for run in runs for key in run.summary.series})
            raise UsageError(
                f"no run has {', '.join(missing)} over {x}; there are {', '.join(known)}"
            )
        for axes in panels:
            axes.legend(frameon=False, fontsize="small")
