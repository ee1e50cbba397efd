"""A program with loggers of its own, for test_others.py: what it is asked for, it sets up as others
do, before or after the launcher, and then everybody speaks.

    python -m tests.telemetry.others SET-UP before|after RANK

writes its log files into the working directory.
"""

from __future__ import annotations

import logging
import logging.config
import logging.handlers
import queue
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.log import get_logger
from launcher.runtime.topology import Topology
from launcher.telemetry.logs import Logs

FORMAT = "theirs %(levelname)s %(message)s"
own, mine, library = (get_logger("launcher.x"), *map(logging.getLogger, ("task", "some.package")))
at_the_end: list[Callable[[], Any]] = []


def formatted(handler: logging.Handler, level: int = logging.NOTSET) -> logging.Handler:
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.setLevel(level)
    return handler


def to_root(handler: logging.Handler) -> None:
    logging.getLogger().addHandler(handler)


def nothing() -> None:
    pass


def basic() -> None:
    logging.basicConfig(level=logging.INFO, format=FORMAT)


def basic_force() -> None:
    to_root(logging.StreamHandler())
    logging.basicConfig(level=logging.INFO, format=FORMAT, force=True)


def basic_stdout() -> None:
    logging.basicConfig(stream=sys.stdout, format=FORMAT)


def basic_file() -> None:
    logging.basicConfig(filename="theirs.log", format=FORMAT)


def basic_unasked() -> None:
    logging.info("a function of logging itself calls basicConfig")


def dict_config(disable: bool, level: str = "INFO", **loggers: Any) -> None:
    console = {"class": "logging.StreamHandler", "formatter": "f", "stream": "ext://sys.stdout"}
    file = {"class": "logging.FileHandler", "formatter": "f", "filename": "theirs.log"}
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": disable,
            "formatters": {"f": {"format": FORMAT}},
            "handlers": {"console": console, "file": file},
            "root": {"level": level, "handlers": ["console", "file"]},
            "loggers": loggers,
        }
    )


def dict_keeps() -> None:
    dict_config(False)


def dict_disables() -> None:
    dict_config(True)


def dict_takes_the_launcher() -> None:
    dict_config(False, launcher={"handlers": ["file"], "propagate": False})


def dict_quiets_the_launcher() -> None:
    dict_config(False, launcher={"level": "ERROR"})


def file_config(disable: bool) -> None:
    Path("logging.ini").write_text(
        "[loggers]\nkeys=root\n[handlers]\nkeys=console\n[formatters]\nkeys=f\n"
        "[logger_root]\nlevel=INFO\nhandlers=console\n"
        "[handler_console]\nclass=StreamHandler\nformatter=f\nargs=(sys.stderr,)\n"
        f"[formatter_f]\nformat={FORMAT}\n"
    )
    logging.config.fileConfig("logging.ini", disable_existing_loggers=disable)


def file_keeps() -> None:
    file_config(False)


def file_disables() -> None:
    file_config(True)


def disable() -> None:
    logging.disable(logging.CRITICAL)


def disable_info() -> None:
    logging.disable(logging.INFO)


def absl() -> None:
    from absl import flags
    from absl import logging as absl_logging

    flags.FLAGS(["program"])
    absl_logging.use_absl_handler()
    absl_logging.get_absl_handler().setFormatter(logging.Formatter(FORMAT))


class Delegating(logging.Handler):
    """Of the shape of absl's, and as older tools have it: all is done by a handler within."""

    def __init__(self) -> None:
        super().__init__()
        self.python_handler = formatted(logging.StreamHandler(sys.stderr))

    def handle(self, record: logging.LogRecord) -> Any:
        return self.python_handler.handle(record)


def delegating() -> None:
    to_root(Delegating())


def rich() -> None:
    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(stderr=True, width=200)
    plain = {"show_time": False, "show_level": False, "show_path": False}
    to_root(formatted(RichHandler(console=console, **plain)))  # type: ignore[arg-type]


def own_file() -> None:
    to_root(formatted(logging.FileHandler("theirs.log")))


def own_stream() -> None:
    mine.addHandler(formatted(logging.StreamHandler()))


def own_stream_alone() -> None:
    own_stream()
    mine.propagate = False


def two_streams() -> None:
    own_stream()
    basic()


def out_and_errors() -> None:
    to_root(formatted(logging.StreamHandler(sys.stdout)))
    to_root(formatted(logging.StreamHandler(sys.stderr), logging.ERROR))


def errors_alone() -> None:
    to_root(formatted(logging.StreamHandler(), logging.ERROR))


def filtered() -> None:
    to_root(handler := formatted(logging.StreamHandler()))
    handler.addFilter(lambda record: "line" not in record.getMessage())


def descriptor() -> None:
    to_root(formatted(logging.StreamHandler(open(2, "w", buffering=1, closefd=False))))  # noqa: SIM115


def device() -> None:
    to_root(formatted(logging.FileHandler("/dev/stderr")))


def buffered() -> None:
    handler = logging.handlers.MemoryHandler(100, target=formatted(logging.StreamHandler()))
    to_root(handler)
    at_the_end.append(handler.flush)


def queued() -> None:
    lines: queue.Queue[Any] = queue.Queue()
    listener = logging.handlers.QueueListener(lines, formatted(logging.StreamHandler()))
    to_root(logging.handlers.QueueHandler(lines))
    listener.start()
    at_the_end.append(listener.stop)


def wrapping() -> None:
    """As tools that report errors do it: all that reaches the handlers is theirs to see."""
    before = logging.Logger.callHandlers

    def call_handlers(self: logging.Logger, record: logging.LogRecord) -> None:
        with Path("theirs.log").open("a") as file:
            file.write(f"{logging.Formatter(FORMAT).format(record)}\n")
        before(self, record)

    logging.Logger.callHandlers = call_handlers  # type: ignore[method-assign]


def own_level() -> None:
    mine.setLevel(logging.ERROR)
    logging.getLogger("launcher").setLevel(logging.ERROR)


def speak() -> None:
    own.info("a step")
    mine.info("my line")
    mine.error("my error")
    library.debug("their detail")
    library.warning("their warning")
    own.error("a failure")
    warnings.warn("careful", stacklevel=1)


def main(name: str, when: str, rank: str) -> None:
    set_up: Callable[[], None] = globals()[name]
    warnings.formatwarning = lambda message, *_: str(message)
    if when == "before":
        set_up()
    with Logs(Topology(int(rank), int(rank), 2, 2, "torchrun"), "INFO", ["task"]) as logs:
        if when == "after":
            set_up()
        logs.open(Path("logs"))
        speak()
        for end in at_the_end:
            end()


if __name__ == "__main__":
    main(*sys.argv[1:])
