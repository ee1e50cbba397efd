"""What a person at rank 0 sees: a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from launcher.telemetry.media import Media
from launcher.telemetry.rundir import POSITION
from launcher.telemetry.sinks import Record, Sink

logger = logging.getLogger(__name__)
COLOURS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31"}


class Console(Sink):
    """A line a record in the log; where stderr is a terminal, a progress bar over the run's steps
    with the same values below the lines."""

    name = "the console"

    def __init__(self, total_steps: int, step: int) -> None:
        """`step` of `total_steps` are done."""
        self.bar: Any = None
        if not sys.stderr.isatty():
            return
        from rich import console, progress
        from rich.text import Text

        self.text = Text.from_ansi
        self.bar = progress.Progress(
            "step",
            progress.MofNCompleteColumn(),
            progress.BarColumn(bar_width=24),
            "{task.fields[values]}",
            progress.TimeRemainingColumn(),
            console=console.Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.task = self.bar.add_task("train", total=total_steps, completed=step, values="")
        self.bar.start()

    def write(self, items: Sequence[Record | Media]) -> None:
        for record in (item for item in items if isinstance(item, dict)):
            # The bar shows training records; evaluations deserve a line above it too.
            beside = self.bar is not None and "train/loss" in record
            logger.info(summary(record), extra={"file_only": beside})
            if beside:
                loss, rate = record["train/loss"], record.get("train/lr", 0.0)
                speed = record.get("perf/samples_per_s", 0.0)
                values = f"epoch {record['epoch']}  loss {loss:.4g}  lr {rate:.3g}"
                values += f"  {speed:.0f} samples/s"
                self.bar.update(self.task, completed=record["step"], values=values)

    def print(self, line: str) -> None:
        """Print a log line above the bar."""
        self.bar.console.print(self.text(line), soft_wrap=True)

    def close(self, completed: bool = False) -> None:
        if self.bar is not None:
            self.bar.stop()


class ConsoleHandler(logging.StreamHandler):
    """Log lines on stderr, above the progress bar where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.pid = os.getpid()
        self.console: Console | None = None

    def attach(self, console: Console) -> None:
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        if os.getpid() != self.pid:
            # A loader worker: the stream and its lock may have been in use when it was forked.
            with contextlib.suppress(OSError):
                os.write(2, f"{self.format(record)}\n".encode(errors="backslashreplace"))
        elif self.console is not None and self.console.bar is not None:
            self.console.print(self.format(record))
        else:
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """The line, in its level's colour where stderr is a terminal that wants colours."""
        line, code = super().format(record), COLOURS.get(record.levelno)
        return f"\x1b[{code}m{line}\x1b[0m" if code and wants_colour() else line


def wants_colour() -> bool:
    """https://no-color.org, and terminals that have none."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stderr.isatty() and not plain


def summary(record: Record) -> str:
    """One line of a record: `step 20  epoch 1  loss 1.234  ...  eta 0:03:20`, system figures left
    out."""
    parts = [f"step {record['step']}", f"epoch {record['epoch']}"]
    for key, value in record.items():
        if key not in POSITION and not key.startswith("system/") and key != "perf/eta_s":
            parts.append(f"{key.removeprefix('train/')} {value:.4g}")
    if "perf/eta_s" in record:
        parts.append(f"eta {timedelta(seconds=round(record['perf/eta_s']))}")
    return "  ".join(parts)
