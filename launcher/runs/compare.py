"""Runs beside each other: which config keys differ, and how their metrics do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.runs.index import Series
from launcher.runs.run import Run

# Keys that differ between any two runs, and say nothing about why their metrics do.
TRIVIAL = ("OUTPUT_DIR",)


def config_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Key -> its value in each run, None where it has none; of keys that are not the same in all.
    Another program's run without a config that can be read is left out of the comparison."""
    keys = sorted({key for run in runs for key in run.config} - set(TRIVIAL))
    known = [run for run in runs if run.config]
    return {
        key: [run.config.get(key) for run in runs]
        for key in keys
        if any(run.config.get(key) != known[0].config.get(key) for run in known)
    }


def compare(runs: Sequence[Run], keys: Sequence[str] = ()) -> dict[str, Any]:
    """Names, config differences, and a row for each metric's last value, and for its best where it
    is known which way that is. `best` holds the places of a row's best runs."""
    rows: list[dict[str, Any]] = []
    found = sorted({key for run in runs for key in run.summary.series})
    for key in keys or found:
        series = [run.summary.series.get(key, Series()) for run in runs]
        mode = next((mode for run in runs if (mode := run.mode(key))), "")
        rows.append(_row(key, "last", [s.last[1] if s.last else None for s in series], mode))
        if mode and not key.startswith(("perf/", "system/")):
            extremes = [getattr(s, mode) for s in series]
            rows.append(_row(key, mode, [e[1] if e else None for e in extremes], mode))
    return {
        "runs": [run.name for run in runs],
        "config": config_differences(runs),
        "metrics": rows,
    }


def _row(key: str, which: str, values: list[float | None], mode: str) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    best: list[int] = []
    if mode and len(known) > 1:
        top = max(known) if mode == "max" else min(known)
        best = [place for place, value in enumerate(values) if value == top]
    return {"key": key, "which": which, "values": values, "best": best}
