"""`launcher runs ...`: reading runs back, finished or live, ours or another program's."""

from __future__ import annotations

import argparse
from pathlib import Path

COLUMNS = "run,state,step,metric,best,last,age,duration"
CODES = "exits 0 completed, 75 stopped or lost, 1 failed, 3 running"
WHERE = "also <, <=, >, >=, !=; a column, config key or metric (min:, max: or best: before it)"
TRACKERS = ("mlflow", "wandb", "tensorboard-dir")
AGAIN = (
    "for job files, before the first attempt and after each: exit 75 where another is worth it, "
    "also after a failure, else 0 (completed), 1 (a file STOP, or two attempts in a row without a "
    "new checkpoint) or 3; NOTES, a file of the job's own, counts them"
)


def main(argv: list[str]) -> int:
    """Run the command. `verify` exits 1 where something is wrong, `why` where two runs differ,
    `status` by the run's state."""
    options = _parser().parse_args(argv)
    # Imported when there is something to do: --help needs neither numpy nor rich.
    from launcher.runs import commands

    if getattr(options, "replay", False):
        from launcher.debug.bisect import by_replay  # the one that needs torch

        options.by_replay = by_replay
    return commands.call(options)


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="launcher runs", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, text: str, runs: int | str = "+", json: str = ""
    ) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        if runs:
            found.add_argument("runs", type=Path, nargs=runs, metavar="RUN", help="a run directory")
        if json:
            found.add_argument("--json", action="store_true", help=f"print JSON instead of {json}")
        return found

    text = "a line a run: state, step, best and last metric; of a sweep also what its points set"
    c = command("list", text, 0, "a table")
    c.add_argument("root", type=Path, nargs="?", default=Path("runs"), metavar="ROOT")
    c.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help=WHERE)
    c.add_argument("--sort", metavar="KEY", default="run", help="a column, metric or config key")
    c.add_argument("--reverse", action="store_true", help="the greatest first")
    c.add_argument("--columns", metavar="KEY,KEY", help=f"instead of {COLUMNS}")
    c.set_defaults(usual=COLUMNS)

    c = command("show", "a run: its curves, what happened, environment, failure", 1, "text")
    c.add_argument("--key", action="append", default=[], help="draw this metric's curve")

    c = command("status", f"how a run is doing; {CODES}", 1, "a line")
    c.add_argument("--again", type=Path, metavar="NOTES", help=AGAIN)

    c = command("tail", "the last records, and with -f those that come", 1, "lines")
    c.add_argument("-f", "--follow", action="store_true", help="until the run ends")
    c.add_argument("-n", "--lines", type=_count, default=10, metavar="N", help="default 10")

    text = "config keys that differ, metrics side by side; of a sweep a line a point"
    c = command("compare", text, "+", "tables")
    c.add_argument("--key", action="append", default=[], help="compare this metric alone")

    c = command("samples", "the samples of one step, by rank and micro-batch", 1, "a table")
    c.add_argument("--step", type=_count, required=True, metavar="N", help="counted from 1")
    c.add_argument("--rank", type=_count, metavar="R", help="of this rank alone")

    c = command("why", "the first record at which two differ, and why; exits 1 then", 2, "text")
    c.add_argument(
        "--replay",
        action="store_true",
        help="run both again around that step: the first module that differs, the keys that do it",
    )

    c.set_defaults(by_replay=None)

    c = command("plot", "curves as a picture (needs the extra `plot`)", "*")
    c.add_argument("--key", action="append", default=[], help="a metric; a panel each")
    c.add_argument("--x", choices=("step", "samples", "time"), default="step")
    c.add_argument("--smooth", type=_weight, default=0.0, metavar="0..1", help="as TensorBoard's")
    c.add_argument("-o", "--output", type=Path, metavar="FILE.png|svg")
    c.add_argument(
        "--schedule",
        nargs="+",
        metavar=("CONFIG", "KEY=VALUE"),
        help="instead: the learning rate that a config file, with overrides, will have, in the "
        "terminal and with -o as a picture",
    )
    c.add_argument(
        "--length",
        type=_count,
        metavar="N",
        help="samples in the training data, for a --schedule in epochs",
    )

    c = command("export", "records as a table: a row a record")
    c.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.csv|parquet|jsonl")

    c = command("publish", "send its records to a tracker, those that no resume takes back", 1)
    c.add_argument("--to", choices=TRACKERS, required=True, help="whose own variables count")
    c.add_argument("-f", "--follow", action="store_true", help="until the run ends")
    c.add_argument("--project", default="", help="mlflow's experiment, wandb's project (launcher)")
    c.add_argument("--name", default="", help="of the run there (default: RUN's)")
    c.add_argument("--dir", type=Path, metavar="DIR", help="of tensorboard-dir: DIR/NAME is made")

    command("verify", "whether everything is as promised; exits 1 if not", 1, "lines")

    c = command("report", "a page of curves, configs and history, in one file")
    c.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE.html")
    return p


def _weight(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value
