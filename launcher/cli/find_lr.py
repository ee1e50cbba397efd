"""`launcher find-lr CONFIG`: a range test of the learning rate, and what it suggests."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.api.attempt import check_task
from launcher.cli.arguments import split_overrides
from launcher.cli.imports import imported, resting
from launcher.config import Config, load_config
from launcher.debug.preset import folder_of, implied
from launcher.errors import RunError, UsageError
from launcher.runtime.topology import read_topology
from launcher.tasks import resolve_task

if TYPE_CHECKING:
    from launcher.debug.suggestion import Suggestion

ROWS = 24  # of the table
# Over what is given: the training step alone, at the rates of the test.
ALONE = [
    *("OPTIM.SCHEDULE", "constant", "OPTIM.WARMUP", "", "TRAIN.MAX_TIME", ""),
    *("EVAL.EVERY", "", "EVAL.AT_START", "False", "EVAL.RAW", "False"),
    *("MODEL.EMA_DECAY", "0", "MODEL.EMA_WARMUP", "False", "MODEL.SWA_START", ""),
    *("CHECKPOINT.EVERY", "", "LOG.EVERY", "1step", "LOG.LEVEL", "ERROR", "LOG.DIGEST", ""),
    *("LOG.TENSORBOARD", "False", "LOG.PROGRESS_BAR", "False", "LOG.MODEL_SUMMARY", "False"),
    *("LOG.COUNT_FLOPS", "False", "DEBUG.NONFINITE", "", "DEBUG.PROFILE", ""),
]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="launcher find-lr",
        usage="launcher find-lr CONFIG [OPTIONS] [KEY VALUE | KEY=VALUE ...]",
        description="Train for a few steps at a rate that rises from step to step, as the config "
        "says otherwise, and show the loss over the rate. Alone, or under torchrun as the run "
        "itself. Everything goes into a temporary directory. Exits 1 where no rate can be "
        "suggested (under torchrun 0).",
        allow_abbrev=False,
    )
    p.add_argument("--config-file", metavar="CONFIG", help="the same as CONFIG")
    p.add_argument("--from", dest="low", type=_rate, default=1e-7, help="first rate (1e-7)")
    p.add_argument("--to", dest="high", type=_rate, default=10.0, help="last rate (10)")
    p.add_argument("--steps", type=int, default=100, metavar="N", help="how many rates (100)")
    p.add_argument(
        "-o", dest="output", type=Path, metavar="FILE.png|svg", help="the curve as a picture, too"
    )
    p.add_argument("--json", action="store_true", help="an object instead of a table")
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    if argv and not re.match(r"-|[A-Z][A-Z0-9_.]*(=|$)", argv[0]):
        argv = ["--config-file", *argv]
    options, settings = split_overrides(parser(), argv)
    if not options.low < options.high:
        raise UsageError(f"--from {options.low:g} is not below --to {options.high:g}")
    if options.steps < 20:
        raise UsageError(f"--steps {options.steps}: fewer than 20 rates make no curve")
    check_picture(options.output)
    topology = read_topology(os.environ)
    folder = folder_of(topology, "find-lr")
    config = load_config(options.config_file, settings, resolve_task)
    more = [*implied(config.cfg), *ALONE, "OUTPUT_DIR", f"{folder}/run"]
    more += ["TRAIN.DURATION", f"{options.steps + 1}step"]  # the last one shows the last rate's
    config = load_config(options.config_file, [*settings, *more], resolve_task)
    check_task(config, False)
    try:
        with resting():
            curve, named = measure(options, config)
    finally:
        if topology.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    if not topology.is_main:
        return 0
    if not curve:
        raise RunError("no loss was recorded: see above what ended the first steps")

    import numpy as np

    from launcher.debug.suggestion import suggest

    rates, losses = np.array(curve).T
    found = suggest(rates, losses)
    if options.output is not None:
        draw(rates, losses, found, options.output)
    if options.json:
        plain = [[float(v) if math.isfinite(v) else None for v in point] for point in curve]
        print(json.dumps({**found.as_dict(), "key": named, "curve": plain}, indent=2), flush=True)
    else:
        print("\n".join(table(rates, losses, found.smoothed)), flush=True)
        print(f"\n{told(found, named)}", flush=True)
    return 0 if found.rate is not None or topology.launched_by == "torchrun" else 1


def measure(options: argparse.Namespace, config: Config) -> tuple[list[Any], str]:
    """The run, with a RangeTest in it: on rank 0 the curve, and what its rates are those of."""
    from launcher.callbacks import BUILTIN, parse, resolve
    from launcher.debug.range_test import RangeTest
    from launcher.engine.run import Job, run
    from launcher.guard.guard import Guard
    from launcher.guard.stop import Signals
    from launcher.runtime.progress import Progress
    from launcher.telemetry.logs import Logs
    from launcher.telemetry.rundir import RunDirectory

    imported()
    cfg, task_class = config.cfg, config.task
    assert task_class is not None  # load_config demands one
    search = [Path(options.config_file).parent] if options.config_file else []
    # The launcher's own by name act on evaluations, or on the rate.
    kept = [entry for entry in cfg.CALLBACKS if parse(entry)[0] not in BUILTIN]
    curve: list[Any] = []
    test = {"low": options.low, "high": options.high, "steps": options.steps, "curve": curve}
    callbacks = [*resolve(kept, [*search, Path.cwd()]), (RangeTest, test)]
    topology, directory = read_topology(os.environ), RunDirectory(cfg.OUTPUT_DIR)
    job = Job(cfg, task_class, directory, argv=sys.argv, callbacks=callbacks, saves=False)
    log, own = cfg.LOG, [task_class.__module__.split(".")[0]]
    with (
        Signals() as signals,
        Logs(topology, log.LEVEL, own, log.FORMAT, log.FILE_MB, log.FILES_KEPT) as logs,
        Guard(cfg, topology, directory, Progress(), signals) as guard,
    ):
        if not run(job, guard.join(task_class), guard, logs):
            raise RunError("stopped before the end; nothing is suggested")
    own_optimizer = hasattr(task_class, "build_optimizer")
    return curve, "the first parameter group of build_optimizer" if own_optimizer else "OPTIM.LR"


def table(rates: Any, losses: Any, smoothed: Any) -> list[str]:
    """The smoothed loss over the rate: a line for each part of the curve, with a bar."""
    import numpy as np

    from launcher.runs.terminal import number

    finite = smoothed[np.isfinite(smoothed)]
    low = finite.min() if len(finite) else 0.0
    # A diverging end would press all else flat: the scale ends a little above the start.
    top = (finite[0] + 0.5 * (finite[0] - low) if len(finite) else 1.0) or 1.0
    lines = [f"{'rate':>9}  {'loss':>10}  {'smoothed':>10}"]
    for place in np.unique(np.linspace(0, len(rates) - 1, ROWS).round().astype(int)):
        value = smoothed[place]
        share = (value - low) / (top - low) if math.isfinite(value) and top > low else 1.0
        bar = "#" * round(32 * min(share, 1.0)) + ">" * int(share > 1)
        cells = (f"{rates[place]:.2e}", number(float(losses[place])), number(float(value)))
        lines.append(f"{cells[0]:>9}  {cells[1]:>10}  {cells[2]:>10}  {bar}".rstrip())
    return lines


def told(found: Suggestion, named: str) -> str:
    """The suggestion in words."""
    if found.rate is None:
        return f"No rate can be suggested: {found.why}."
    return f"{named} {found.rate:.2g}: {found.why}."


def check_picture(output: Path | None) -> None:
    """Refuse, before the time is spent, what could not be drawn at the end."""
    if output is None:
        return
    if output.suffix not in (".png", ".svg"):
        raise UsageError(f"-o {output}: the name must end in .png or .svg")
    if not output.parent.is_dir():
        raise UsageError(f"-o {output}: {output.parent} is no directory")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("pip install 'launcher[plot]' for -o") from error


def draw(rates: Any, losses: Any, found: Suggestion, output: Path) -> None:
    """The curve, with what was read off it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color="C0", alpha=0.25, linewidth=1)
    axes.plot(rates, found.smoothed, color="C0", label="loss, smoothed")
    for rate, label, color in ((found.rate, "suggested", "C2"), (found.rises, "rises", "C3")):
        if rate is not None:
            axes.axvline(rate, color=color, linestyle="--", label=f"{label}: {rate:.2g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(output, dpi=120)


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
