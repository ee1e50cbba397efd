"""Python logging: rank 0 on the console, every rank in a file of its own."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import sys
import threading
from pathlib import Path
from types import TracebackType

from launcher.runtime.topology import Topology
from launcher.telemetry.console import Console, ConsoleHandler
from launcher.telemetry.funnel import Funnel
from launcher.telemetry.logfile import LogFile

logger = logging.getLogger("launcher")


class Logs:
    """This process's log handlers. Lines wait in memory until the run directory exists."""

    def __init__(
        self,
        topology: Topology,
        level: str,
        own_modules: list[str],
        form: str = "text",
        file_mb: float = 10.0,
        files_kept: int = 3,
    ) -> None:
        """`form`, `file_mb` and `files_kept` are LOG.FORMAT, LOG.FILE_MB and LOG.FILES_KEPT."""
        self.topology = topology
        self.file_options = form, file_mb, files_kept
        self.console = ConsoleHandler(topology.rank)
        self.console.setFormatter(logging.Formatter(self._console_format(), "%H:%M:%S"))
        # Rank 0 speaks for all; what goes wrong elsewhere is heard with its rank.
        self.console.setLevel(level if topology.is_main else logging.WARNING)
        self.early = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
        self.file: logging.Handler | None = None
        self.funnel = Funnel([self.console, self.early])
        logging.getLogger().addHandler(self.funnel)
        # The level is that of the launcher and of the user's own task; libraries keep theirs.
        for name in ["launcher", *own_modules]:
            logging.getLogger(name).setLevel(level)
        logging.captureWarnings(True)
        self.hooks = sys.excepthook, threading.excepthook
        sys.excepthook = _log_uncaught
        threading.excepthook = _log_thread

    def _console_format(self) -> str:
        if self.topology.is_main:
            return "%(asctime)s %(levelname).1s %(message)s"
        return f"%(asctime)s %(levelname).1s rank {self.topology.rank}: %(message)s"

    def open(self, directory: Path) -> None:
        """Start logs/rank<K>.log with the lines logged so far."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"rank{self.topology.rank}.log"
        self.file = LogFile(path, *self.file_options)
        self.early.setTarget(self.file)
        self.funnel.acquire()
        try:
            self.early.close()
            self.funnel.targets = [self.console, self.file]
        finally:
            self.funnel.release()

    def __enter__(self) -> Logs:
        self.console.elsewhere.end()
        return self

    def __exit__(self, *_: object) -> None:
        self.funnel.end()
        self.close()

    def attach(self, console: Console) -> None:
        """Print above this progress bar from now on."""
        self.console.console = console

    def close(self) -> None:
        logging.getLogger().removeHandler(self.funnel)
        for handler in (self.funnel, self.console, self.early, self.file):
            if handler is not None:
                with contextlib.suppress(OSError):  # a full disk
                    handler.close()
        logging.captureWarnings(False)
        sys.excepthook, threading.excepthook = self.hooks


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logger.critical("uncaught exception", exc_info=(kind, error, trace))


def _log_thread(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread else "?"
    if args.exc_value is not None:
        logger.critical(
            "uncaught exception in thread %s",
            name,
            exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
        )
