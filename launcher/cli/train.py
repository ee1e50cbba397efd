"""`launcher train`: from the command line to a run. Mistakes answer before torch is imported."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import shutil
import sys
import tempfile
from pathlib import Path

from launcher.cli.arguments import split_overrides
from launcher.cli.imports import imported, resting
from launcher.config import Config, load_config
from launcher.config.checks import evaluates
from launcher.config.coerce import expand
from launcher.config.problem import Mistake
from launcher.debug.preset import PRESET, added, folder_of
from launcher.errors import RunError, UsageError
from launcher.guard.stop import STOPPED, Signals
from launcher.log import get_logger
from launcher.provenance.check import check_code
from launcher.provenance.code import Code
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology, read_topology
from launcher.tasks import overrides, resolve_task
from launcher.tasks.resolve import BUILTIN
from launcher.tasks.sources import modules_of
from launcher.telemetry.rundir import RunDirectory

logger = get_logger(__name__)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="launcher train",
        usage="launcher train --config-file FILE [OPTIONS] [KEY VALUE | KEY=VALUE ...]",
        description="Train a task. Alone it is one process; under torchrun or srun, one rank of "
        "many. Any config key can be overridden; `launcher config keys` lists them.",
        allow_abbrev=False,
    )
    p.add_argument(
        "--config-file",
        metavar="FILE",
        type=_path,
        help="the run's YAML config, or the name of one that ships",
    )
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest valid checkpoint in the run directory; start if there is none",
    )
    p.add_argument(
        "--resume-from",
        metavar="CKPT",
        type=lambda text: Path(_path(text)),
        help="start a new run directory with the full state of any checkpoint of any run",
    )
    p.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate a checkpoint, print the metrics and write evaluations/<UTC time>.json",
    )
    p.add_argument(
        "--checkpoint",
        metavar="last|best|PATH",
        type=_path,
        default="last",
        help="the checkpoint that --eval-only evaluates (default: last)",
    )
    p.add_argument(
        "--split",
        metavar="NAME[,NAME]",
        action="append",
        default=[],
        help="the splits that --eval-only evaluates (default: EVAL.SPLITS)",
    )
    p.add_argument(
        "--overwrite",
        action="store_true",
        help="set the old run directory aside as DIR.old-<UTC time>, then start",
    )
    p.add_argument(
        "--allow",
        metavar="KEY[,KEY]",
        action="append",
        default=[],
        help="accept these differences to the checkpoint at --resume (also DATASET_LENGTH, "
        "TASK_STATE, CODE)",
    )
    p.add_argument(
        "--check",
        action="store_true",
        help="report every mistake in the config, or print the resolved config, and exit",
    )
    p.add_argument(
        "--debug",
        action="store_true",
        help="the debugging preset: no workers, deterministic, anomalies detected, 20 steps into a "
        "temporary directory; the debugger opens on an exception where there is a terminal",
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="one step, one batch of each evaluation, a save and a load in a temporary directory, "
        "and what each takes; then exit",
    )
    # What torch.distributed.launch adds; the same stands in the environment.
    p.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)
    return p


def train(argv: list[str]) -> int:
    """Run the command; the exit code is 0 done, 2 bad usage or config, 75 stopped early on purpose
    (under torchrun 0), 1 anything else. Raises Ended for a failure that has been told of."""
    # First of all: torch is imported with the task, and a signal may come meanwhile.
    with Signals() as signals, resting():
        return _train(argv, signals)


def _train(argv: list[str], signals: Signals) -> int:
    options, settings = split_overrides(parser(), argv)
    if options.resume and options.overwrite:
        raise UsageError("--resume goes on with a run, --overwrite starts over: give one of them.")
    given = (options.resume, options.resume_from, options.overwrite, options.eval_only)
    if options.dry_run and any(given):
        raise UsageError(
            "--dry-run starts a run of its own, in a temporary directory: give it without "
            "--resume, --resume-from, --overwrite and --eval-only."
        )
    topology = read_topology(os.environ)
    spare = folder_of(topology, "debug" if options.debug else "dry-run")
    if options.debug:
        settings = [*PRESET, "OUTPUT_DIR", f"{spare}/run", *settings]
    config = load_config(options.config_file, settings, resolve_task)
    if more := added(config.cfg, spare, options.dry_run):
        config = load_config(options.config_file, [*settings, *more], resolve_task)
    cfg, task_class = config.cfg, config.task
    if topology.world_size <= cfg.DEBUG.BREAK_RANK:
        raise UsageError(
            f"DEBUG.BREAK_RANK {cfg.DEBUG.BREAK_RANK}: the last rank is {topology.world_size - 1}"
        )
    splits = [name for text in options.split for name in text.split(",")]
    if splits and not options.eval_only:
        raise UsageError("--split is for --eval-only; EVAL.SPLITS says what a run evaluates.")
    if options.eval_only and not (splits or cfg.EVAL.SPLITS):
        raise UsageError("EVAL.SPLITS names nothing to evaluate: give --split NAME.")
    check_task(config, options.eval_only or evaluates(cfg))
    if options.check:
        print(cfg.dump(), end="")
        return 0
    assert task_class is not None  # load_config demands one
    directory = RunDirectory(cfg.OUTPUT_DIR)
    restarted = is_restart(topology, directory)
    resume = options.resume or restarted
    if topology.is_main and not options.eval_only:
        try:
            refuse(directory, resume, options.overwrite)
        except UsageError as error:
            # What a restart finds in its way may be gone at the next: a rank that still ends, say.
            raise (RunError(str(error)) if restarted else error) from None
    allow = frozenset(key for text in options.allow for key in text.split(","))
    code, changed = None, ""
    if topology.is_main and not options.eval_only:
        code = Code(modules_of(cfg.TASK.NAME, task_class, BUILTIN))
        changed = check_code(code, directory.path, resume, options.resume_from, allow, restarted)

    if not faulthandler.is_enabled():
        faulthandler.enable(2)  # where native code ends this process, its stacks are told

    # From here on torch is needed, which takes seconds to import.
    from launcher.callbacks import BUILTIN as CALLBACKS
    from launcher.callbacks import parse, resolve
    from launcher.cli.evaluate import evaluate_only
    from launcher.debug.dry_run import dry_run
    from launcher.debug.explain import debugging
    from launcher.engine.run import Job, run
    from launcher.guard.guard import Guard
    from launcher.optim.optimizers import optimizer_class
    from launcher.telemetry.logs import Logs

    imported()
    search = [Path(options.config_file).parent] if options.config_file else []
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
        argv=sys.argv,
        resume=resume,
        resume_from=options.resume_from,
        allow=allow,
        callbacks=callbacks,
        checkpoint=options.checkpoint,
        splits=splits,
        code=code,
    )
    log, own = cfg.LOG, [task_class.__module__.split(".")[0]]
    with (
        Logs(topology, log.LEVEL, own, log.FORMAT, log.FILE_MB, log.FILES_KEPT) as logs,
        Guard(cfg, topology, directory, Progress(), signals) as guard,
    ):
        runtime = guard.join(task_class)
        if options.eval_only:
            done = evaluate_only(job, runtime, guard)
        else:
            if restarted and topology.is_main:
                logger.info("a restart: going on with the run in %s", directory.path)
            if changed:
                logger.warning("%s", changed)
            logger.info("%s on %s", topology, runtime.device)
            with debugging() if options.debug else contextlib.nullcontext():
                train = dry_run if options.dry_run else run
                done = train(job, runtime, guard, logs)
    if options.dry_run and topology.is_main:
        shutil.rmtree(spare, ignore_errors=True)
    # torchrun takes any other code for a failure, and starts the ranks again.
    return 0 if done or topology.launched_by == "torchrun" else STOPPED


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


def _path(text: str) -> str:
    """An option that is a path, with `~` and `$VARIABLES` put in as in the config's keys."""
    try:
        return expand(text)
    except Mistake as mistake:
        raise argparse.ArgumentTypeError(str(mistake)) from mistake


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
