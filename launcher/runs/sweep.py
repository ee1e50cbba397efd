"""A sweep's directory, read back: its points, and the runs that have begun.

sweep.json          what was asked for, and what each point sets
configs/<P>.yaml    each point's config, over the base
runs/<P>            its run directory
sweep.sbatch, sweep.sh    an array job of Slurm's, and a loop for one machine
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UsageError
from launcher.runs.index import OURS
from launcher.runs.run import Run, run_at

FILE, CONFIGS, RUNS = "sweep.json", "configs", "runs"


class Waiting(Run):
    """A point whose run has not begun: what it sets is all that is known."""

    state = "waiting"  # type: ignore[assignment]

    def __init__(self, path: Path, name: str, settings: dict[str, Any]) -> None:
        super().__init__(path, OURS, path / "metrics.jsonl", name)
        self.config = settings


@dataclass(frozen=True)
class Sweep:
    path: Path
    points: dict[str, dict[str, Any]]  # name -> what it sets

    @property
    def keys(self) -> list[str]:
        """What differs between the points."""
        return list(next(iter(self.points.values()), {}))

    def runs(self) -> list[Run]:
        """A run for each point, in their order."""
        found = []
        for name, settings in self.points.items():
            path = self.path / RUNS / name
            found.append(run_at(path, name) or Waiting(path, name, settings))
        return found


def read_sweep(path: Path) -> Sweep | None:
    """The sweep in a directory; None where it holds none. Raises UsageError for a broken one."""
    file = path / FILE
    if not file.exists():
        return None
    try:
        points = json.loads(file.read_text(encoding="utf-8"))["points"]
        return Sweep(path, {name: dict(settings) for name, settings in points.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} cannot be read: {error!r}") from error


def begun(path: Path) -> list[Path]:
    """The directories of a sweep's runs that have begun; of anything else itself."""
    sweep = read_sweep(path)
    if sweep is None:
        return [path]
    found = [run.path for run in sweep.runs() if not isinstance(run, Waiting)]
    if not found:
        raise UsageError(f"no point of {path} has begun; {path / 'sweep.sh'} runs them")
    return found
