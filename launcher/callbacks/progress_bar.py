"""A progress bar on the terminal, below the log lines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from launcher.callbacks import Run
from launcher.telemetry.logs import ConsoleHandler
from launcher.telemetry.media import Media
from launcher.telemetry.sinks import Record, Sink


class ProgressBar:
    """Where stderr is a terminal: a bar over the run's steps with the values of the last record."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def sink(self) -> Sink:
        return Bar(self.run.data.total_steps, self.run.progress.step, self.run.console)


class Bar(Sink):
    """Shows training records, whose lines are then left to the log file. The log's other lines on
    the console are printed above the bar.

    What else is printed to stderr is not (rich's `redirect_stderr` would see to it): a loader
    worker, forked while the bar is drawn, would wait for its lock.
    """

    name = "the progress bar"

    def __init__(self, total_steps: int, step: int, log: ConsoleHandler | None) -> None:
        """`step` of `total_steps` are done; `log` has the log's lines on the console."""
        console = Console(stderr=True, soft_wrap=True)
        self.bar = Progress(
            "step",
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            "{task.fields[values]}",
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.task = self.bar.add_task("train", total=total_steps, completed=step, values="")
        self.bar.start()
        above: Any = FileProxy(console, sys.stderr)
        self.log = log
        if log is not None:
            self.stream = log.setStream(above)
            log.addFilter(_is_no_training)

    def write(self, items: Sequence[Record | Media]) -> None:
        for record in items:
            if isinstance(record, dict) and "perf/step_s" in record:
                shown = ("train/loss", "train/lr")  # with phases, of each
                parts = [
                    f"{key.removeprefix('train/')} {value:.4g}"
                    for key, value in record.items()
                    if key.startswith(shown)
                ]
                speed = f"{record.get('perf/samples_per_s', 0.0):.0f} samples/s"
                values = "  ".join([f"epoch {record['epoch']}", *parts, speed])
                self.bar.update(self.task, completed=record["step"], values=values)

    def close(self, completed: bool) -> None:
        self.bar.stop()
        if self.log is not None:
            self.log.removeFilter(_is_no_training)
            self.log.setStream(self.stream)


def _is_no_training(line: logging.LogRecord) -> bool:
    return not getattr(line, "training", False)
