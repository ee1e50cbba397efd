"""`launcher train`: from the command line to a run. Mistakes answer before torch is imported."""

from __future__ import annotations

import argparse
import faulthandler
import os
import shutil
import sys
from pathlib import Path

from launcher.api.attempt import Asked, Train, attempt, check
from launcher.cli.arguments import split_overrides
from launcher.cli.imports import imported, resting
from launcher.config import load_config
from launcher.config.coerce import expand
from launcher.config.problem import Mistake
from launcher.debug.preset import PRESET, added, folder_of
from launcher.errors import UsageError
from launcher.guard.stop import STOPPED, Signals
from launcher.runtime.topology import read_topology
from launcher.tasks import resolve_task


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
    cfg = config.cfg
    splits = [name for text in options.split for name in text.split(",")]
    if splits and not options.eval_only:
        raise UsageError("--split is for --eval-only; EVAL.SPLITS says what a run evaluates.")
    if options.eval_only and not (splits or cfg.EVAL.SPLITS):
        raise UsageError("EVAL.SPLITS names nothing to evaluate: give --split NAME.")
    check(config, topology, options.eval_only)
    if options.check:
        print(cfg.dump(), end="")
        return 0
    asked = Asked(
        sys.argv,
        options.config_file,
        resume=options.resume,
        resume_from=options.resume_from,
        overwrite=options.overwrite,
        allow=frozenset(key for text in options.allow for key in text.split(",")),
        eval_only=options.eval_only,
        checkpoint=options.checkpoint,
        splits=splits,
    )
    done = attempt(config, topology, asked, signals, lambda: _ready(options))
    if options.dry_run and topology.is_main:
        shutil.rmtree(spare, ignore_errors=True)
    # torchrun takes any other code for a failure, and starts the ranks again.
    return 0 if done or topology.launched_by == "torchrun" else STOPPED


def _ready(options: argparse.Namespace) -> Train:
    """What is to be done, with torch imported for it."""
    if not faulthandler.is_enabled():
        faulthandler.enable(2)  # where native code ends this process, its stacks are told

    from launcher.cli.evaluate import evaluate_only
    from launcher.debug.dry_run import dry_run
    from launcher.debug.explain import debugging
    from launcher.engine.run import run

    imported()
    if options.eval_only:
        return lambda job, runtime, guard, logs: evaluate_only(job, runtime, guard)
    train = dry_run if options.dry_run else run
    return debugging()(train) if options.debug else train


def _path(text: str) -> str:
    """An option that is a path, with `~` and `$VARIABLES` put in as in the config's keys."""
    try:
        return expand(text)
    except Mistake as mistake:
        raise argparse.ArgumentTypeError(str(mistake)) from mistake
