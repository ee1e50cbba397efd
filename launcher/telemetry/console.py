"""What a person at rank 0 sees: a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from launcher.telemetry.elsewhere import Elsewhere
from launcher.telemetry.logfile import coloured
from launcher.telemetry.recorder import Record
from launcher.telemetry.repeats import Repeats


def plain(file_only: bool) -> dict[str, bool]:
    """The `extra` of a log call whose line goes to the log file but not to the console."""
    return {"file_only": file_only}


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
    """Log lines on stderr, above the progress bar where there is one; repeats are counted, and the
    warnings of a rank other than 0 shown where no lower rank gives them as well."""

    console: Console | None = None
    elsewhere: Elsewhere | None = None  # on ranks other than 0

    def __init__(self) -> None:
        super().__init__()
        self.repeats, self.pid = Repeats(), os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        for one in self.repeats(record):
            if os.getpid() != self.pid:
                # A forked loader worker: it has neither the threads nor the progress bar.
                if self.elsewhere is None or not self.elsewhere.given(one):
                    super().emit(one)
            elif self.elsewhere is not None and one.levelno < logging.ERROR:
                self.elsewhere.add(one)
            else:
                self._print(one)

    def show(self, record: logging.LogRecord) -> None:
        """Print a record, whatever else there is of it. Called by another thread."""
        self.acquire()
        try:
            self._print(record)
        finally:
            self.release()

    def _print(self, record: logging.LogRecord) -> None:
        if self.console is not None and self.console.interactive:
            self.console.print(self.format(record))
        else:
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return coloured(super().format(record), record.levelno)

    def close(self) -> None:
        self.acquire()
        try:
            left = self.repeats.end()
        finally:
            self.release()
        for one in left:
            if self.elsewhere is not None:
                self.elsewhere.add(one)
            else:
                self._print(one)
        if self.elsewhere is not None:
            self.elsewhere.close()
        super().close()
