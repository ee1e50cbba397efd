"""`launcher runs ...`: reading runs back, finished or live, ours or another program's."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError

if TYPE_CHECKING:  # numpy, orjson and rich are imported where they are used: --help needs none
    from rich.console import Console

    from launcher.runs.run import Run

COLUMNS = "run,state,step,metric,best,last,age,duration"
CODES = "exits 0 completed, 75 stopped or lost, 1 failed, 3 running"


def main(argv: list[str]) -> int:
    """Run the command. `verify` exits 1 where something is wrong, `status` by the run's state."""
    options = _parser().parse_args(argv)
    return options.call(options)


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="launcher runs", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, call: Any, text: str, runs: str = "") -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        found.set_defaults(call=call)
        if runs == "RUN":
            found.add_argument("run", type=Path, metavar="RUN", help="a run directory")
        elif runs:
            found.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
        return found

    c = command("list", _list, "a line a run: state, step, best and last metric")
    c.add_argument("root", type=Path, nargs="?", default=Path("runs"), metavar="ROOT")
    c.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help=WHERE)
    c.add_argument("--sort", metavar="KEY", default="run", help="a column, metric or config key")
    c.add_argument("--reverse", action="store_true", help="the greatest first")
    c.add_argument("--columns", default=COLUMNS, metavar="KEY,KEY", help=f"instead of {COLUMNS}")
    c.add_argument("--metric", metavar="KEY", help="best and last of this one")
    c.add_argument("--json", action="store_true", help="print JSON instead of a table")

    c = command("show", _show, "a run: its curves, what happened, environment, failure", "RUN")
    c.add_argument("--key", action="append", default=[], help="draw this metric's curve")
    c.add_argument("--json", action="store_true", help="print JSON instead of text")

    c = command("status", _status, f"how a run is doing; {CODES}", "RUN")
    c.add_argument("--json", action="store_true", help="print JSON instead of a line")
    c.add_argument("--again", type=Path, metavar="NOTES", help=AGAIN)

    c = command("tail", _tail, "the last records, and with -f those that come", "RUN")
    c.add_argument("-f", "--follow", action="store_true", help="until the run ends")
    c.add_argument("-n", "--lines", type=int, default=10, metavar="N", help="how many (default 10)")
    c.add_argument("--json", action="store_true", help="print the records as they stand")

    c = command("compare", _compare, "config keys that differ, metrics side by side", "RUNS")
    c.add_argument("--key", action="append", default=[], help="compare this metric alone")
    c.add_argument("--json", action="store_true", help="print JSON instead of tables")

    c = command("plot", _plot, "curves as a picture (needs the extra `plot`)", "RUNS")
    c.add_argument("--key", action="append", default=[], help="a metric; a panel each")
    c.add_argument("--x", choices=("step", "samples", "time"), default="step")
    c.add_argument("--smooth", type=_weight, default=0.0, metavar="0..1", help="as TensorBoard's")
    c.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.png|svg")

    c = command("export", _export, "records as a table: a row a record", "RUNS")
    c.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.csv|parquet|jsonl")

    c = command("verify", _verify, "whether everything is as promised; exits 1 if not", "RUN")
    c.add_argument("--json", action="store_true", help="print JSON instead of lines")

    c = command("report", _report, "a page of curves, configs and history, in one file", "RUNS")
    c.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE.html")
    return p


WHERE = "also <, <=, >, >=, !=; a column, config key or metric (min:, max: or best: before it)"


AGAIN = (
    "for job files, before the first attempt and after each: exit 75 where another is worth it, "
    "also after a failure, else 0 (completed), 1 (a file STOP, or two attempts in a row without a "
    "new checkpoint) or 3; NOTES, a file of the job's own, counts them"
)


def _weight(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return value


def _console() -> Console:
    """As wide as the terminal, or as COLUMNS says; in a pipe nothing is cut off."""
    import os

    from rich.console import Console

    fixed = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(width=None if fixed else 400, highlight=False, soft_wrap=not fixed)


def _print_json(value: Any) -> None:
    import orjson  # NaN becomes null

    options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
    print(orjson.dumps(value, default=str, option=options).decode())


def _tell_damage(runs: list[Run]) -> None:
    """Lines that could not be read, on stderr: never fatal."""
    for run in runs:
        told = run.damaged
        for line in told[:3]:
            print(f"launcher: not read: {line}", file=sys.stderr)
        if len(told) > 3:
            print(f"launcher: not read: {len(told) - 3} more in {run.path}", file=sys.stderr)


def _list(options: argparse.Namespace) -> int:
    from launcher.runs import select
    from launcher.runs.run import find, load_summaries
    from launcher.runtime.cpu import cpu_budget

    if not options.root.is_dir():
        raise UsageError(f"{options.root} is no directory")
    runs = list(find(options.root))
    if not runs:
        print(f"launcher: no runs below {options.root}", file=sys.stderr)
    load_summaries(runs, cpu_budget(1).usable)
    for run in runs:
        if options.metric:
            run.metric = options.metric
    tests = [select.condition(text) for text in options.where]
    columns = [c for c in options.columns.split(",") if c]
    select.check(runs, [*columns, options.sort, *(test.key for test in tests)])
    runs = [run for run in runs if all(test(run) for test in tests)]
    runs = select.ordered(runs, options.sort, options.reverse)
    if options.json:
        _print_json([{"path": str(run.path), **select.row(run, columns)} for run in runs])
    else:
        from launcher.runs.terminal import list_table

        _console().print(list_table(runs, columns))
    _tell_damage(runs)
    return 0


def _show(options: argparse.Namespace) -> int:
    from launcher.runs import select
    from launcher.runs.run import open_run

    run = open_run(options.run)
    select.check([run], options.key)
    if options.json:
        _print_json(select.whole(run))
    else:
        from launcher.runs.terminal import show

        console = _console()
        console.print(show(run, options.key, min(console.width, 100)))
    _tell_damage([run])
    return 0


def _status(options: argparse.Namespace) -> int:
    from launcher.runs.again import again
    from launcher.runs.status import read_status

    if options.again is not None:
        code, told = again(options.run, options.again)
        print(told)
        return code
    found = read_status(options.run)
    if options.json:
        print(json.dumps(vars(found), indent=2))
    else:
        when = datetime.fromtimestamp(found.updated).isoformat(" ", "seconds")
        reason = f" ({found.reason})" if found.reason else ""
        print(f"{found.state}{reason}: step {found.step}, epoch {found.epoch}, updated {when}")
    return found.exit_code


def _tail(options: argparse.Namespace) -> int:
    from launcher.runs.run import open_run
    from launcher.runs.tail import tail

    try:
        for line in tail(open_run(options.run), options.lines, options.follow, options.json):
            print(line, flush=True)
    except KeyboardInterrupt:
        return 130
    return 0


def _compare(options: argparse.Namespace) -> int:
    from launcher.runs import select
    from launcher.runs.compare import compare
    from launcher.runs.run import open_runs

    runs = open_runs(options.runs)
    select.check(runs, options.key)
    found = compare(runs, options.key)
    if options.json:
        _print_json(found)
    else:
        from launcher.runs.terminal import compare_tables

        _console().print(compare_tables(found))
    _tell_damage(runs)
    return 0


def _plot(options: argparse.Namespace) -> int:
    from launcher.runs.plot import plot
    from launcher.runs.run import open_runs

    runs = open_runs(options.runs)
    keys = [key for text in options.key for key in text.split(",")] or [runs[0].metric]
    plot(runs, keys, options.x, options.smooth, options.output)
    _tell_damage(runs)
    return 0


def _export(options: argparse.Namespace) -> int:
    from launcher.runs.export import export
    from launcher.runs.run import open_runs

    runs = open_runs(options.runs)
    count = export(runs, options.output)
    _tell_damage(runs)
    print(f"{count} records of {len(runs)} runs in {options.output}", file=sys.stderr)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from launcher.runs.run import open_run
    from launcher.runs.verify import verify

    run = open_run(options.run)
    findings = verify(run)
    if options.json:
        print(json.dumps([vars(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{finding.where}: {finding.what}")
        if not findings:
            print(f"{run.path}: as promised ({run.summary.records} records)")
    return 1 if findings else 0


def _report(options: argparse.Namespace) -> int:
    from launcher.runs.report import report
    from launcher.runs.run import open_runs

    runs = open_runs(options.runs)
    try:
        options.output.write_text(report(runs), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"-o {options.output}: {error.strerror}") from error
    _tell_damage(runs)
    return 0
