"""Curves of runs as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from launcher.errors import UsageError
from launcher.runs.records import Array
from launcher.runs.run import Run

AXES = {"step": "step", "samples": "samples", "time": "hours since the first record"}


def smooth(values: Array, weight: float) -> Array:
    """TensorBoard's smoothing: an exponential moving average, divided by what the values so far
    weigh, so that the start is not drawn to zero. NaN stays and counts for nothing."""
    if not weight:
        return values
    out = np.empty(len(values))
    average, debias = 0.0, 0.0
    for place, value in enumerate(values.tolist()):
        if value == value:
            average = weight * average + (1 - weight) * value
            debias = weight * debias + (1 - weight)
            out[place] = average / debias
        else:
            out[place] = value
    return out


def plot(runs: Sequence[Run], keys: Sequence[str], x: str, smoothing: float, output: Path) -> None:
    """Draw a panel a key with a curve a run, the values themselves faint behind smoothed ones.

    Raises UsageError where there is nothing to draw, or nothing to draw it with.
    """
    if output.suffix not in (".png", ".svg"):
        raise UsageError(f"-o {output}: the name must end in .png or .svg")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("pip install 'launcher[plot]' to plot") from error

    # Text as text: it can be searched, and looks like the page around it.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "launcher"}):
        figure = Figure(figsize=(8, 1 + 3 * len(keys)), layout="constrained")
        panels = figure.subplots(len(keys), squeeze=False)[:, 0]
        drawn: set[str] = set()
        for number, run in enumerate(runs):
            table, color = run.table(keys), f"C{number % 10}"
            # matplotlib hides labels that begin with _, and takes what is between two $ for maths.
            label = f" {run.name}".replace("$", r"\$")
            for key, axes in zip(keys, panels, strict=True):
                at, values = table.series(key, x)
                if not len(values) or np.isnan(at).all():
                    continue
                if x == "time":
                    at = (at - np.nanmin(table.position["time"])) / 3600
                marker = "o" if len(values) == 1 else None
                if smoothing:
                    axes.plot(at, values, color=color, alpha=0.25, linewidth=1)
                axes.plot(at, smooth(values, smoothing), color=color, label=label, marker=marker)
                drawn.add(key)
        if missing := [key for key in keys if key not in drawn]:
            known = sorted({key for run in runs for key in run.summary.series})
            raise UsageError(
                f"no run has {', '.join(missing)} over {x}; there are {', '.join(known)}"
            )
        for key, axes in zip(keys, panels, strict=True):
            axes.set_title(key, loc="left", parse_math=False)
            axes.grid(alpha=0.3)
            axes.margins(x=0.01)
            axes.legend(frameon=False, fontsize="small")
        panels[-1].set_xlabel(AXES[x])
        try:
            figure.savefig(
                output, dpi=120, metadata={"Date": None} if output.suffix == ".svg" else None
            )
        except OSError as error:
            raise UsageError(f"-o {output}: {error.strerror}") from error
