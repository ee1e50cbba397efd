"""One attempt at a run, with this process as one of its ranks: what the command line and
`launcher.train` share. Torch is imported when nothing more can be told without it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from launcher.config import Config
from launcher.config.checks import evaluates
from launcher.errors import RunError, UsageError
from launcher.guard import stop
from launcher.log import get_logger
from launcher.provenance.check import check_code
from launcher.provenance.code import Code
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology
from launcher.tasks import overrides
from launcher.tasks.resolve import BUILTIN
from launcher.tasks.sources import modules_of
from launcher.telemetry.rundir import RunDirectory

if TYPE_CHECKING:
    from launcher.engine.run import Job
    from launcher.guard.guard import Guard
    from launcher.runtime.process import Runtime
    from launcher.telemetry.logs import Logs

# Whether the run is through, and not asked to stop before its end.
Train: TypeAlias = "Callable[[Job, Runtime, Guard, Logs], bool]"
logger = get_logger(__name__)


@dataclass(frozen=True)
class Asked:
    """What is asked for beside the config; see `launcher train --help`."""

    argv: Sequence[str]  # for environment.json
    config_file: str | None = None
    resume: bool = False
    resume_from: Path | None = None
    overwrite: bool = False
    allow: frozenset[str] = frozenset()
    eval_only: bool = False
    checkpoint: str = "last"
    splits: Sequence[str] = ()


def attempt(
    config: Config,
    topology: Topology,
    asked: Asked,
    signals: stop.Signals,
    ready: Callable[[], Train],
    leave: Callable[[int], None] = stop.leave,
) -> bool:
    """Whether the run is through; False where it was asked to stop. `ready()` imports torch and
    says what is to be done with the job; `leave` ends the process in a hang, or when asked twice.

    Raises UsageError before anything is made, Ended for a failure that has been told of.
    """
    cfg, task_class = config.cfg, config.task
    assert task_class is not None  # load_config demands one
    directory = RunDirectory(cfg.OUTPUT_DIR)
    restarted = is_restart(topology, directory)
    resume = asked.resume or restarted
    try:
        code, changed = None, ""
        if topology.is_main and not asked.eval_only:
            try:
                refuse(directory, resume, asked.overwrite)
            except UsageError as error:
                # What a restart finds in its way may be gone at the next: a rank that still ends.
                raise (RunError(str(error)) if restarted else error) from None
            code = Code(modules_of(cfg.TASK.NAME, task_class, BUILTIN))
            here = directory.path, resume, asked.resume_from
            changed = check_code(code, *here, asked.allow, restarted)
        # From here on torch is needed, which takes seconds to import.
        train = ready()
        from launcher.callbacks import BUILTIN as CALLBACKS
        from launcher.callbacks import parse, resolve
        from launcher.engine.run import Job
        from launcher.guard.guard import Guard
        from launcher.optim.optimizers import optimizer_class
        from launcher.telemetry.logs import Logs

        search = [Path(asked.config_file).parent] if asked.config_file else []
        callbacks = resolve(cfg.CALLBACKS, [*search, Path.cwd()])
        for entry, (made, _) in zip(cfg.CALLBACKS if code else (), callbacks, strict=False):
            assert code is not None
            code.modules += modules_of(parse(entry)[0], made, CALLBACKS)
        optimizer = optimizer_class(cfg.OPTIM.NAME)
        if code is not None and ":" in cfg.OPTIM.NAME:
            code.modules += modules_of(cfg.OPTIM.NAME, optimizer, {})
        job = Job(
            cfg,
            task_class,
            directory,
            argv=asked.argv,
            resume=resume,
            resume_from=asked.resume_from,
            allow=asked.allow,
            callbacks=callbacks,
            checkpoint=asked.checkpoint,
            splits=asked.splits,
            code=code,
        )
        log, own = cfg.LOG, [task_class.__module__.split(".")[0]]
        with (
            Logs(topology, log.LEVEL, own, log.FORMAT, log.FILE_MB, log.FILES_KEPT) as logs,
            Guard(cfg, topology, directory, Progress(), signals, leave=leave) as guard,
        ):
            runtime = guard.join(task_class)
            if not asked.eval_only:
                if restarted and topology.is_main:
                    logger.info("a restart: going on with the run in %s", directory.path)
                if changed:
                    logger.warning("%s", changed)
                logger.info("%s on %s", topology, runtime.device)
            return train(job, runtime, guard, logs)
    finally:
        directory.release()  # the process may live on, and start another


def check(config: Config, topology: Topology, eval_only: bool = False) -> None:
    """Raise UsageError for what an attempt cannot do, as far as the config tells it."""
    cfg = config.cfg
    if topology.world_size <= cfg.DEBUG.BREAK_RANK:
        raise UsageError(
            f"DEBUG.BREAK_RANK {cfg.DEBUG.BREAK_RANK}: the last rank is {topology.world_size - 1}"
        )
    check_task(config, eval_only or evaluates(cfg))


def check_task(config: Config, evaluated: bool) -> None:
    """Raise UsageError where the task cannot do what its config asks for."""
    cfg = config.cfg
    if config.task and evaluated and not overrides(config.task, "eval_step"):
        raise UsageError(
            f"{cfg.TASK.NAME} has no eval_step, which an evaluation needs. Give it one, or set "
            'EVAL.EVERY "".'
        )
    if callable(getattr(config.task, "schedule", None)) and cfg.OPTIM.SCHEDULE != "constant":
        raise UsageError(
            f"{cfg.TASK.NAME} has a schedule, and OPTIM.SCHEDULE is {cfg.OPTIM.SCHEDULE}: one of "
            "them has to go. With OPTIM.SCHEDULE constant the task's counts, after OPTIM.WARMUP."
        )


def is_restart(topology: Topology, directory: RunDirectory) -> bool:
    """Whether this goes on with what the same job has begun.

    torchrun tries again after any failure. Where the run here is another job's, the first try was
    refused, or was to set it aside: so is this one.
    """
    if topology.job_id == "":  # nobody knows whose run it is
        return topology.restarts + topology.retries > 0
    unfinished = directory.read_status().get("state") != "completed"
    ours = directory.begun_by(topology.job_id)
    return topology.restarts > 0 or (ours and (unfinished or topology.retries > 0))


def refuse(directory: RunDirectory, resume: bool, overwrite: bool) -> None:
    """Refuse a directory that cannot be written, is in use or holds a run. Rank 0 alone asks."""
    check_writable(directory.path)
    if not directory.holds_run():
        return
    if not resume and not overwrite:
        raise UsageError(
            f"{directory.path} already holds a run. Go on with it with --resume, start a new one "
            "from a checkpoint with --resume-from CKPT and another OUTPUT_DIR, or start over with "
            "--overwrite (the old one is set aside)."
        )
    # An owner that is just leaving, as at a restart, gets time to do so.
    directory.claim(wait_s=10.0 if resume else 0.0)


def check_writable(path: Path) -> None:
    """Raise UsageError where a run directory could not be made or written; touches nothing."""
    try:
        # exists() itself fails for a name that is too long, or in a closed folder.
        existing = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not existing.is_dir():
            raise UsageError(f"OUTPUT_DIR {path}: {existing} is a file; choose another.")
        # Trying is the only test that holds for root, read-only mounts and full quotas alike.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UsageError(
            f"OUTPUT_DIR {path} cannot be written: {error.strerror}. Choose another with "
            "OUTPUT_DIR DIR."
        ) from error
