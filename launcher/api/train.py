"""`launcher.train`: a run from Python, in this process or as ranks that it starts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from launcher.api.attempt import Asked, Train, attempt, check
from launcher.api.kept import EarlyStop, Interrupts, kept
from launcher.api.ranks import run_ranks
from launcher.api.runs import OpenRun, open_run
from launcher.api.settings import as_words, check_found_elsewhere, name_of
from launcher.config import Config, load_config
from launcher.config.coerce import expand
from launcher.config.problem import Mistake
from launcher.debug.preset import implied
from launcher.errors import Ended, RunError, UsageError
from launcher.guard import stop
from launcher.runtime.topology import Topology, read_topology
from launcher.tasks import resolve_task
from launcher.tasks.resolve import check_methods
from launcher.telemetry.rundir import RunDirectory

Settings = Mapping[str, Any]


def train(
    config: str | os.PathLike[str] | Settings | None = None,
    task: type | None = None,
    *,
    overrides: Settings | None = None,
    ranks: int | None = None,
    resume: bool = False,
    resume_from: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    allow: str | Iterable[str] = (),
) -> OpenRun:
    """Train, and return the run: completed, or stopped by Ctrl-C or whatever else stops a run.

    `config` is a YAML file, or a CfgNode or dict of keys over the defaults, dotted or nested;
    `overrides` are keys over that. `task` is a class, which need stand in no file, or None for what
    TASK.NAME says. Without `ranks` the run is one process, this one, which is left as it was found;
    under torchrun it is this rank's part. With `ranks=N` that many are started on this machine.
    The other options are those of `launcher train`.

    Raises UsageError for what there is to mend before a run starts, and what the run itself failed
    with; of ranks RunError, with the traceback of the one that failed first. KeyboardInterrupt
    where it was asked to stop before its first step, or twice.
    """
    file, words = None, as_words(overrides or {})
    if isinstance(config, Mapping):
        words = [*as_words(config), *words]
    elif config is not None:
        file = _path(config)
    if task is not None:
        if not isinstance(task, type):
            raise UsageError(f"task is {task!r}: give the class, or its name as TASK.NAME")
        words.append(f"TASK.NAME={name_of(task)}")
    if resume and overwrite:
        raise UsageError("resume goes on with a run, overwrite starts over: give one of them.")
    came_from = Path(_path(resume_from)) if resume_from is not None else None
    allowed = allow.split(",") if isinstance(allow, str) else list(allow)
    topology = read_topology(os.environ)
    loaded = _loaded(file, words, task)
    if more := implied(loaded.cfg):
        loaded = _loaded(file, words := [*words, *more], task)
    options = ["--config-file", file] if file else []
    options += [f"--{name}" for name, on in (("resume", resume), ("overwrite", overwrite)) if on]
    options += [f"--resume-from={came_from}"] if came_from is not None else []
    options += [f"--allow={key}" for key in allowed]
    if ranks is not None:
        if topology.distributed:
            raise UsageError(
                f"ranks={ranks}: this process is a rank of a run already. Where that run has "
                "imported this call with its task, put the call under `if __name__ == "
                '"__main__":`; under torchrun leave ranks out.'
            )
        if ranks < 1:
            raise UsageError(f"ranks={ranks}: at least one")
        if task is not None:
            check_found_elsewhere(task)
        check(loaded, Topology(world_size=ranks))
        run_ranks([*options, *words], ranks, RunDirectory(loaded.cfg.OUTPUT_DIR))
    else:
        check(loaded, topology)
        asked = Asked(
            ["launcher.train", *options, *words],
            file,
            resume=resume,
            resume_from=came_from,
            overwrite=overwrite,
            allow=frozenset(allowed),
        )
        _in_this_process(loaded, topology, asked)
    return open_run(loaded.cfg.OUTPUT_DIR)


def _in_this_process(config: Config, topology: Topology, asked: Asked) -> None:
    if topology.distributed:  # a rank, which others wait for: it ends as every rank does
        with stop.Signals() as signals:
            try:
                attempt(config, topology, asked, signals, _ready)
            except Ended as ended:
                raise _behind(ended) from None
        return
    if threading.current_thread() is not threading.main_thread():
        raise UsageError(
            "launcher.train trains in the main thread, which alone gets signals: from another one "
            "give ranks=1, for a process of its own."
        )
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        raise UsageError(
            "this process has a process group, which a run of one process would take down: end it "
            "with torch.distributed.destroy_process_group(), or give ranks=1, for a process of its "
            "own."
        )
    signals, began = Interrupts(), time.time()
    try:
        with signals, kept():
            attempt(config, topology, asked, signals, _ready, signals.leave)
    except EarlyStop:
        raise KeyboardInterrupt("stopped before the first step") from None
    except (Ended, KeyboardInterrupt) as error:
        if signals.hung:
            raise RunError(_hang(config, began)) from None
        raise (_behind(error) if isinstance(error, Ended) else error) from None
    finally:
        signals.handed_on()


def _ready() -> Train:
    from launcher.engine.run import run

    return run


def _behind(ended: Ended) -> BaseException:
    """What a run failed with, which the guard has told of and put its word in place of."""
    return ended.__context__ or ended


def _hang(config: Config, began: float) -> str:
    """The end of a run that hung, in words."""
    from launcher.runs.index import OURS
    from launcher.runs.run import Run

    path = Path(config.cfg.OUTPUT_DIR)
    failure = Run(path, OURS, path / "metrics.jsonl", path.name).failure
    if failure.get("time", 0.0) < began:  # an earlier attempt's
        return "the run was ended, for nothing moved before its first step (DIST.INIT_TIMEOUT)"
    return f"{failure['exception']} (see {path / 'failure.json'})"


def _loaded(file: str | None, words: list[str], task: type | None) -> Config:
    def given(name: str, search: list[Path], builtin_only: bool = False) -> type:
        assert task is not None
        check_methods(name, task)
        return task

    return load_config(
        file, words, given if task is not None else resolve_task, typed="launcher.train"
    )


def _path(path: str | os.PathLike[str]) -> str:
    """A path with `~` and `$VARIABLES` put in as on the command line."""
    try:
        return str(expand(os.fspath(path)))
    except Mistake as mistake:
        raise UsageError(f"{os.fspath(path)}: {mistake}") from None
