"""`launcher replay RUN --step N`: a step of a run once more, and the proof that it is the same."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.cli.imports import imported, resting
from launcher.debug.plan import ReplayPlan, kept_code, plan_replay, recorded
from launcher.debug.preset import NO_LIMITS
from launcher.errors import UsageError

# What another rank of a replay is told by the one that starts it: the folder to write to.
MEMBER = "LAUNCHER_REPLAY"
NOTHING_KNOWN = (
    "nothing that is known differs between then and now: what remains is the content of the data, "
    "and operations that give other bits each time (launcher doctor --config-file finds these)"
)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="launcher replay",
        description="Start from the newest kept checkpoint before a step, on as many ranks as the "
        "run had (on one where it has TRAIN.SHARDS), run to the step and compare all that is "
        "recorded on the way. Nothing in RUN is changed. Exits 1 where anything differs.",
        allow_abbrev=False,
    )
    p.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    p.add_argument("--step", type=int, required=True, metavar="N", help="the step to come to")
    p.add_argument("--rank", type=int, default=0, metavar="R", help="look at this rank (default 0)")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--pdb", action="store_true", help="stop in train_step of that step")
    how.add_argument("--stats", action="store_true", help="print what goes through each module")
    how.add_argument("--profile", action="store_true", help="trace that step with torch.profiler")
    how.add_argument("--trace", type=Path, help=argparse.SUPPRESS)  # for `runs why --replay`
    how.add_argument("--anomaly", action="store_true", help="detect anomalies in that step")
    p.add_argument(
        "--code",
        choices=("now", "run"),
        default="now",
        help="the task's files as they are now, or as the run kept them in code/",
    )
    # For `runs why --replay`: another run's values of some keys, and its records to compare with;
    # the last step at which a checkpoint may lie.
    p.add_argument("--with", dest="changed", type=json.loads, default={}, help=argparse.SUPPRESS)
    p.add_argument("--against", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--before", type=int, help=argparse.SUPPRESS)
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    options = parser().parse_args(argv)
    from launcher.runs.run import open_run

    run = open_run(options.run.resolve())
    plan = plan_replay(run, options.step, options.before, options.changed)
    if options.pdb and MEMBER not in os.environ and not sys.stdin.isatty():
        raise UsageError("--pdb needs a terminal")
    if not 0 <= options.rank < plan.ranks:
        raise UsageError(f"--rank {options.rank}: the run had ranks 0 to {plan.ranks - 1}")
    if MEMBER in os.environ or plan.world_size == 1:
        with tempfile.TemporaryDirectory(prefix="launcher-replay-") as own:
            return _replay(options, run, plan, Path(os.environ.get(MEMBER, own)))
    return _with_others(options, argv, run, plan)


def _with_others(options: argparse.Namespace, argv: list[str], run: Any, plan: ReplayPlan) -> int:
    """Be the rank that is looked at, so that a debugger has this terminal, beside the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="launcher-replay-") as folder:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), MEMBER: folder}
        world = {"WORLD_SIZE": str(plan.world_size), "LOCAL_WORLD_SIZE": str(plan.world_size)}

        def env(rank: int) -> dict[str, str]:
            return {**place, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}

        command = [sys.executable, "-m", "launcher", "replay", *argv]
        others = [
            subprocess.Popen(command, env=os.environ | env(rank), stdin=subprocess.DEVNULL)
            for rank in range(plan.world_size)
            if rank != options.rank
        ]
        os.environ.update(env(options.rank))
        try:
            code = _replay(options, run, plan, Path(folder))
            return max(code, *(other.wait() for other in others))
        finally:
            for other in others:
                if other.poll() is None:
                    other.kill()


@resting()
def _replay(options: argparse.Namespace, run: Any, plan: ReplayPlan, folder: Path) -> int:
    """This rank's part."""
    theirs = recorded((options.against or run.path).resolve())
    trace = options.trace and options.trace.resolve()
    ranks = run.environment.get("ranks") or [{}]
    # Sums depend on the threads: as many as then, whatever this shell says. A checkpoint tells.
    os.environ.pop("OMP_NUM_THREADS", None)
    if plan.checkpoint is None and "threads" in ranks[0]:
        os.environ["OMP_NUM_THREADS"] = str(ranks[0]["threads"])
    if os.path.isdir(there := run.environment.get("directory", "")):
        os.chdir(there)  # where TASK.NAME and other paths are sought from
        if there not in sys.path:
            sys.path.insert(0, there)
    ways = ("pdb", "stats", "profile", "anomaly", "trace")
    how = next((name for name in ways if getattr(options, name)), "")

    from launcher.callbacks import resolve
    from launcher.config import CfgNode, load_config
    from launcher.config.keys import put
    from launcher.config.units import parse_duration
    from launcher.debug.replay import Comparison, Replay, Replayed
    from launcher.engine.run import Job
    from launcher.engine.run import run as train
    from launcher.guard.guard import Guard
    from launcher.guard.stop import Signals
    from launcher.provenance.code import Code
    from launcher.runtime.progress import Progress
    from launcher.runtime.topology import read_topology
    from launcher.tasks import BUILTIN, resolve_task
    from launcher.tasks.sources import modules_of
    from launcher.telemetry.logs import Logs
    from launcher.telemetry.rundir import RunDirectory

    imported()
    settings = ["OUTPUT_DIR", str(folder / "run"), "LOG.TENSORBOARD", "False", "TRAIN.MAX_TIME", ""]
    settings += ["LOG.LEVEL", "WARNING", "LOG.PROGRESS_BAR", "False", "DEBUG.BREAK_RANK", "-1"]
    settings += ["DEBUG.NONFINITE", ""]  # such a step is to be looked at to its end
    if how == "pdb":
        settings += NO_LIMITS
    folder.mkdir(exist_ok=True)
    file = folder / f"config.{os.getpid()}.yaml"
    tree = CfgNode()
    for key, value in plan.config.items():
        put(tree, key, value)
    search = [Path.cwd(), *config_folder(run)]
    if options.code == "run":
        search.insert(0, use_kept_code(run, plan, tree))
        plan = replace(plan, allow=plan.allow | {"TASK.NAME"})  # the same task, from elsewhere
    file.write_text(tree.dump(), encoding="utf-8")
    config = load_config(str(file), settings, resolve_task)
    cfg, task_class = config.cfg, config.task
    assert task_class is not None
    duration = parse_duration(cfg.LOG.EVERY)
    comparison = Comparison(theirs, duration is not None and duration.unit == "s")
    made = (Replay, {"plan": plan, "comparison": comparison, "rank": options.rank, "how": how})
    inside = contextlib.ExitStack()
    made[1].update(out=trace or Path(tempfile.gettempdir()), inside=inside)
    topology, directory = read_topology(os.environ), RunDirectory(cfg.OUTPUT_DIR)
    code = None
    if topology.is_main:
        code = Code(modules_of(cfg.TASK.NAME, task_class, BUILTIN))
        tell_changed_code(run, plan, code)
    job = Job(
        cfg,
        task_class,
        directory,
        argv=sys.argv,
        resume_from=plan.checkpoint,
        allow=plan.allow | ({"TASK.NAME", "OPTIM.NAME"} if options.code == "run" else set()),
        callbacks=[*resolve(cfg.CALLBACKS, search), made],
        saves=False,
        code=code,
    )
    log, own = cfg.LOG, [task_class.__module__.split(".")[0]]
    with (
        Signals() as signals,
        Logs(topology, log.LEVEL, own, log.FORMAT, log.FILE_MB, log.FILES_KEPT) as logs,
        Guard(cfg, topology, directory, Progress(), signals) as guard,
    ):
        runtime = guard.join(task_class)
        with contextlib.suppress(Replayed), inside:
            train(job, runtime, guard, logs)
    if not topology.is_main or how == "trace":
        return 0
    return told(run, plan, comparison, directory.path)


def config_folder(run: Any) -> list[Path]:
    """Where the config file lay that the run was started with: files of CALLBACKS are sought there,
    as well as from the working directory."""
    command = [str(word) for word in run.environment.get("command") or ()]
    if "--config-file" in command[:-1]:
        return [Path(command[command.index("--config-file") + 1]).absolute().parent]
    return []


def use_kept_code(run: Any, plan: ReplayPlan, tree: Any) -> Path:
    """Have the task, and what it imports, come from the run's own version of it; the folder."""
    version = kept_code(run, plan)
    if version is None:
        raise UsageError(f"--code run: {run.path} keeps no code of the attempt that did that step")
    folder = (version.path / "files").resolve()
    place, _, name = tree.TASK.NAME.rpartition(":")
    if place.endswith(".py"):
        tree.TASK.NAME = f"{folder / version.main}:{name}"
    place, _, name = tree.OPTIM.NAME.rpartition(":")
    kept = [path for path in (folder / place, folder / Path(place).name) if path.is_file()]
    if kept:
        tree.OPTIM.NAME = f"{kept[0]}:{name}"
    sys.path.insert(0, str(folder))
    return folder


def tell_changed_code(run: Any, plan: ReplayPlan, code: Any) -> None:
    """Say so where the task's files are not those that did the step."""
    from launcher.provenance.kept import changes, contents

    version = kept_code(run, plan)
    if version is None:
        return
    changed = [str(c) for c in changes(contents(version), code.files(version))]
    if changed:
        print(
            f"launcher: the task's files are not those that did this step ({', '.join(changed)}); "
            "--code run takes those",
            file=sys.stderr,
            flush=True,
        )


def told(run: Any, plan: ReplayPlan, comparison: Any, now: Path) -> int:
    """Say what was the same and what not, and what differs between then and `now`, the directory of
    this replay; the exit code."""
    ranks = f"{plan.world_size} rank{'s' * (plan.world_size > 1)}"
    if plan.world_size < plan.ranks:
        ranks = f"1 rank, for the {plan.ranks} that the run had (TRAIN.SHARDS)"
    print(f"replayed steps {plan.begin + 1} to {plan.step} of {run.path} on {ranks}", flush=True)
    if not comparison.differing:
        at = comparison.proved
        if at:
            print(f"the same: {comparison.same} recorded values, digests at steps {at}")
        else:
            print(
                f"the same: {comparison.same} recorded values; no digest was recorded on the way, "
                "so nothing proves the weights (LOG.DIGEST records some)"
            )
        return 0
    step, key, before, after = comparison.differing[0]
    print(f"NOT the same: {key} at step {step} was {before}, and is {after}")
    if (digest := comparison.first_digest()) is not None:
        equal = max((at for at in comparison.proved if at < digest), default=None)
        known = "" if equal is None else f", equal at step {equal}"
        print(f"the weights differ at step {digest}{known}")
    more = len(comparison.differing) - 1
    if more:
        print(f"and {more} more value{'s' * (more > 1)} of {comparison.same + more + 1}")
    from launcher.runs.answers import cause_line
    from launcher.runs.run import open_run
    from launcher.runs.why import why

    then, again = open_run(run.path), open_run(now)
    then.name, again.name = "then", "now"
    # It begins from a checkpoint by design.
    causes = [cause for cause in why(then, again)["causes"] if cause["kind"] != "lineage"]
    print("what differs between then and now:" if causes else NOTHING_KNOWN)
    for cause in causes:
        print(f"  {cause_line(cause)}")
        for hunk in cause["hunks"]:
            print("\n".join(f"    {line}" for line in hunk))
    return 1
