"""What a person at rank 0 sees: a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from launcher.telemetry.elsewhere import Elsewhere
from launcher.telemetry.recorder import Record

COLOURS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31"}


class Console:
    """A progress bar over the steps of a run; does nothing where stderr is no terminal."""

    def __init__(self, total_steps: int, enabled: bool) -> None:
        self.interactive = enabled and sys.stderr.isatty()
        self.progress: Any = None
        if not self.interactive:
            return
        from rich.console import Console as RichConsole
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        self.text = Text.from_ansi
        self.rich = RichConsole(stderr=True)
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
            console=self.rich,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.task = self.progress.add_task("train", total=total_steps, values="")

    def start(self, step: int) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=step)
            self.progress.start()

    def update(self, record: Record) -> None:
        """Show a record's training loss, rate and speed beside the bar."""
        if self.progress is None:
            return
        fields = {}
        if "train/loss" in record:
            fields["values"] = (
                f"epoch {record['epoch']}  loss {record['train/loss']:.4g}  "
                f"lr {record.get('train/lr', 0):.3g}  "
                f"{record.get('perf/samples_per_s', 0):.0f} samples/s"
            )
        self.progress.update(self.task, completed=record["step"], **fields)

    def print(self, line: str) -> None:
        """Print a log line above the bar."""
        self.rich.print(self.text(line), soft_wrap=True)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


class ConsoleHandler(logging.StreamHandler):
    """Log lines on stderr, above the progress bar where there is one; warnings that several ranks
    give are shown once."""

    console: Console | None = None

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.elsewhere = Elsewhere(rank, self._show)

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        if logging.WARNING <= record.levelno < logging.ERROR:
            self.elsewhere.add(record)
        else:
            self._show(record)

    def _show(self, record: logging.LogRecord) -> None:
        self.acquire()
        try:
            if self.console is not None and self.console.interactive:
                self.console.print(self.format(record))
            else:
                super().emit(record)
        finally:
            self.release()

    def format(self, record: logging.LogRecord) -> str:
        """The line, in its level's colour where stderr is a terminal that wants colours."""
        line, code = super().format(record), COLOURS.get(record.levelno)
        return f"\x1b[{code}m{line}\x1b[0m" if code and wants_colour() else line

    def close(self) -> None:
        self.elsewhere.end()
        super().close()


def wants_colour() -> bool:
    """https://no-color.org, and terminals that have none."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stderr.isatty() and not plain
