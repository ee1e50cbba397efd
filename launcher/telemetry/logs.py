"""Python logging: rank 0 on the console, every rank in a file of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import sys
import threading
import warnings
from collections import deque
from pathlib import Path
from typing import Any

from launcher.log import console_of, consoles, get_logger, shown_on, wrapped
from launcher.runtime.topology import Topology

logger = get_logger("launcher")
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
COLOURS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31"}
EARLY = 10_000  # lines that wait for the file


class Logs:
    """This process's log handlers, while the context lasts. Lines wait in memory until `open`."""

    def __init__(
        self,
        topology: Topology,
        level: str,
        own_modules: list[str],
        form: str = "text",
        file_mb: float = 10.0,
        files_kept: int = 3,
    ) -> None:
        """`level` is that of the launcher and of the user's `own_modules`; libraries keep theirs.
        `form`, `file_mb` and `files_kept` are LOG.FORMAT, LOG.FILE_MB and LOG.FILES_KEPT."""
        self.name = f"rank{topology.rank}.log"
        self.least = logging.NOTSET if topology.is_main else logging.ERROR  # on the console
        self.undo, self.troubled = contextlib.ExitStack(), False
        self.levels = dict.fromkeys(["launcher", *own_modules], level)
        self.console = ConsoleHandler()
        # Rank 0 speaks for all; what goes wrong elsewhere is heard with its rank.
        who = "" if topology.is_main else f"rank {topology.rank}: "
        line = f"%(asctime)s %(levelname).1s {who}%(message)s"
        self.console.setFormatter(logging.Formatter(line, "%H:%M:%S"))
        self.console.setLevel(level if topology.is_main else logging.ERROR)
        self.file = LogFile(int(file_mb * (1 << 20)), files_kept)
        self.file.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT))

    def __enter__(self) -> Logs:
        # No handler of ours is on a logger: there basicConfig and logging.config would take it
        # away, and basicConfig would do nothing because of it.
        enter = self.undo.enter_context
        enter(wrapped(logging.Logger, "callHandlers", self._line))
        enter(wrapped(logging.Handler, "handle", self._handle))
        enter(wrapped(threading, "excepthook", _log_thread))
        # logging.warning() and its like ask, without options, for a console: there is one.
        enter(wrapped(logging, "basicConfig", lambda basic, **how: basic(**how) if how else None))
        for name, level in self.levels.items():
            if (logger := logging.getLogger(name)).level == logging.NOTSET:
                logger.setLevel(level)
                self.undo.callback(logger.setLevel, logging.NOTSET)
        warned, warn = logging.getLogger("py.warnings"), warnings.showwarning
        self.undo.callback(setattr, warned, "__class__", type(warned))
        get_logger("py.warnings")
        logging.captureWarnings(True)
        if warnings.showwarning is not warn:
            self.undo.callback(logging.captureWarnings, False)
        return self

    def _line(self, others: Any, logger: logging.Logger, record: logging.LogRecord) -> None:
        """A line in the file, to the handlers of others, and on the console if none shows it."""
        shown = shown_on(record)  # before a handler copies the record, for a queue, say
        self.file.handle(record)
        try:
            others(logger, record)
        except Exception as error:
            # The launcher's own lines end no thread of its own, nor the telling of a failure.
            if not f"{record.name}.".startswith("launcher."):
                raise
            if not self.troubled:
                self.troubled = True
                print(f"launcher: a handler of Python's logging failed: {error!r}", file=sys.stderr)
        thread, everywhere = threading.get_ident(), dict.fromkeys(consoles())
        hidden = getattr(record, "file_only", False) or any(x != thread for x in shown.values())
        if not hidden and record.levelno >= self.console.level:
            shown.update(everywhere)
            self.console.handle(record)

    def _handle(self, handle: Any, handler: logging.Handler, record: logging.LogRecord) -> Any:
        """What a handler does with a line: nothing, where that would put it on the console and it
        is ours, or stands there, or is less than an error of another rank."""
        console = console_of(handler)
        if console is None or isinstance(handler, ConsoleHandler):
            return handle(handler, record)
        ours = f"{record.name}.".startswith("launcher.") or handler is logging.lastResort
        shown, thread = shown_on(record), threading.get_ident()
        if ours or record.levelno < self.least or shown.setdefault(console, thread) != thread:
            return False
        if passed := handle(handler, record):
            shown[console] = None
        return passed

    def open(self, directory: Path) -> None:
        """Start rank<K>.log in this directory with the lines logged so far."""
        directory.mkdir(parents=True, exist_ok=True)
        self.file.open(directory / self.name)

    def __exit__(self, *_: object) -> None:
        self.undo.close()


class ConsoleHandler(logging.StreamHandler):
    """Log lines on stderr."""

    def __init__(self) -> None:
        super().__init__()
        self.pid = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        if os.getpid() == self.pid:
            super().emit(record)
            return
        # A loader worker: the stream and its lock may have been in use when it was forked.
        with contextlib.suppress(OSError):
            os.write(2, f"{self.format(record)}\n".encode(errors="backslashreplace"))

    def format(self, record: logging.LogRecord) -> str:
        """The line, in its level's colour where stderr is a terminal that wants colours."""
        line, code = super().format(record), COLOURS.get(record.levelno)
        # https://no-color.org, and terminals that have none.
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        coloured = code and sys.stderr.isatty() and not plain
        return f"\x1b[{code}m{line}\x1b[0m" if coloured else line


class LogFile(logging.Handler):
    """A log file of at most so many bytes (0: no limit), with older ones beside it as .1, .2, ...

    It is opened for each line: a loader worker, which may be forked before the file is there or
    while a line is written, writes as its rank does (what it said before the file was there with
    its next line), but leaves it to the rank to rotate the file.
    A line that cannot be written (a full disk) is lost, and nothing else.
    """

    def __init__(self, most: int, files_kept: int) -> None:
        super().__init__()
        self.most, self.files_kept, self.pid = most, files_kept, os.getpid()
        self.early: deque[tuple[int, bytes]] = deque(maxlen=EARLY)
        self.path = mmap.mmap(-1, 4096)  # shared with workers; as a string of C's

    def open(self, path: Path) -> None:
        """Write here from now on; first what came before."""
        self.path[:] = os.fsencode(path.absolute()).ljust(len(self.path), b"\0")
        self._write_early()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        except Exception:  # a log call whose arguments do not fit its text, say
            self.handleError(record)
            return
        self.early.append((os.getpid(), line))
        self._write_early()

    def _write_early(self) -> None:
        with contextlib.suppress(IndexError):  # none is left
            while self.path[0]:
                pid, line = self.early.popleft()
                if pid == os.getpid():  # in a worker: the rank writes its own
                    self._write(line)

    def _write(self, line: bytes) -> None:
        path = Path(os.fsdecode(self.path[:].rstrip(b"\0")))
        with contextlib.suppress(OSError):
            if self.most and os.getpid() == self.pid and path.exists():
                self._rotate(path, path.stat().st_size + len(line))
            with path.open("ab", buffering=0) as file:
                file.write(line)

    def _rotate(self, path: Path, length: int) -> None:
        names = [path, *(path.with_name(f"{path.name}.{n + 1}") for n in range(self.files_kept))]
        for n in range(self.files_kept if length > self.most else 0, 0, -1):
            if names[n - 1].exists():
                names[n - 1].replace(names[n])


class JsonFormatter(logging.Formatter):
    """A line of strict JSON a log record: time, level, logger, message, and exception."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {"time": record.created, "level": record.levelname}
        entry |= {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def _log_thread(hook: Any, args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread else "?"
    if args.exc_type is not SystemExit:  # which ends a thread, and is no error
        logger.critical("uncaught exception in thread %s", name, exc_info=args.exc_value)
