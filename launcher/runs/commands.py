"""What each `launcher runs` command prints or writes; cli/runs.py has their options."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import orjson
from rich.console import Console, RenderableType

from launcher.errors import RunError, UsageError
from launcher.runs import answers, schedule, select, terminal
from launcher.runs.again import again
from launcher.runs.compare import compare
from launcher.runs.export import export
from launcher.runs.plot import plot
from launcher.runs.publish import Destination, publish
from launcher.runs.report import report
from launcher.runs.run import Run, find, load_summaries, open_runs, printable
from launcher.runs.samples import samples
from launcher.runs.status import read_status
from launcher.runs.sweep import begun, read_sweep
from launcher.runs.tail import tail
from launcher.runs.verify import verify
from launcher.runs.why import why
from launcher.runtime.cpu import cpu_budget


def call(options: Namespace) -> int:
    """Run the command, and tell on stderr which lines of its runs could not be read."""
    # What another encoding cannot show is escaped; JSON is UTF-8 always.
    as_json = getattr(options, "json", False)
    form = {"encoding": "utf-8"} if as_json else {"errors": "backslashreplace"}
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(**form)
    if options.command == "list":
        return _list(options)
    if options.command == "status":
        return _status(options)
    if (output := getattr(options, "output", None)) and not output.parent.is_dir():
        raise UsageError(f"-o {output}: {output.parent} is no directory")
    if options.command == "plot":
        if options.schedule:
            return _schedule(options)
        if not options.runs or options.output is None:
            raise UsageError("plot needs runs and -o FILE.png, or --schedule CONFIG")
    # A sweep stands for its runs where there may be several.
    several = options.command in ("compare", "plot", "export", "report")
    paths = [run for path in options.runs for run in (begun(path) if several else [path])]
    runs = open_runs(paths)
    try:
        code = COMMANDS[options.command](runs, options)
    except BrokenPipeError:  # `| head`
        raise
    except OSError as error:
        raise RunError(f"{error.filename}: {error.strerror}") from error
    if options.command not in ("tail", "verify"):  # they tell it themselves
        _tell_damage(runs)
    return code


def _list(options: Namespace) -> int:
    if not options.root.is_dir():
        raise UsageError(f"{options.root} is no directory")
    tests = [select.condition(text) for text in options.where]
    sweep = read_sweep(options.root)
    found = list(find(options.root)) if sweep is None else sweep.runs()
    if not found:
        print(f"launcher: no runs below {options.root}", file=sys.stderr)
    load_summaries(found, cpu_budget(1).usable)
    columns = [column for column in (options.columns or options.usual).split(",") if column]
    if sweep is not None and not options.columns:
        columns[1:1] = sweep.keys
    select.check(found, [*columns, options.sort, *(test.key for test in tests)])
    chosen = [run for run in found if all(test(run) for test in tests)]
    runs = select.ordered(chosen, options.sort, options.reverse)
    if options.json:
        columns += ["total"] if "step" in columns else []
        _print_json([run.plain(columns) for run in runs])
    else:
        _print(terminal.list_table(runs, columns))
    _tell_damage(runs)
    return 0


def _show(runs: Sequence[Run], options: Namespace) -> int:
    (run,) = runs
    select.check(runs, options.key)
    if options.json:
        _print_json(run.everything())
    else:
        _print(terminal.show(run, options.key, min(_console().width, 100)))
    return 0


def _status(options: Namespace) -> int:
    if options.again is not None:
        code, told = again(options.runs[0], options.again)
        print(told, flush=True)
        return code
    found = read_status(options.runs[0])
    if options.json:
        _print_json(found)
    else:
        reason = f" ({found.reason})" if found.reason else ""
        position = f"step {found.step}, epoch {found.epoch}"
        print(
            f"{found.state}{reason}: {position}, updated {terminal.moment(found.updated)}",
            flush=True,
        )
    return found.exit_code


def _tail(runs: Sequence[Run], options: Namespace) -> int:
    try:
        for line in tail(runs[0], options.lines, options.follow, options.json):
            print(line, flush=True)
    except KeyboardInterrupt:
        return 130
    return 0


def _compare(runs: Sequence[Run], options: Namespace) -> int:
    select.check(runs, options.key)
    sweep = read_sweep(options.runs[0]) if len(options.runs) == 1 else None
    if sweep is None:
        _tell(compare(runs, options.key), options, terminal.compare_tables)
        return 0
    found = compare(runs, options.key or [runs[0].metric])
    swept = {key: [run.config.get(key) for run in runs] for key in sweep.keys}
    found["config"] = swept | found["config"]
    _tell(found, options, terminal.points_table)
    if waiting := len(sweep.points) - len(runs):
        print(f"launcher: {waiting} of {len(sweep.points)} points have not begun", file=sys.stderr)
    return 0


def _samples(runs: Sequence[Run], options: Namespace) -> int:
    found = samples(runs[0], options.step, options.rank)
    _tell(found, options, answers.samples_table)
    return 0


def _why(runs: Sequence[Run], options: Namespace) -> int:
    found = why(*runs)
    if options.by_replay is not None:
        found["replay"] = options.by_replay(runs[0], runs[1], found)
        found["next"] = [line for line in found["next"] if "--replay" not in line]
    _tell(found, options, answers.why_text)
    return 0 if found["records"]["first"] is None else 1


def _schedule(options: Namespace) -> int:
    if options.runs:
        raise UsageError("plot takes runs or --schedule, not both; put overrides after the config")
    config, *overrides = options.schedule
    curves = schedule.curves(config, overrides, options.length)
    _print(schedule.drawn(curves, min(_console().width, 100)))
    if options.output is not None:
        schedule.plot(curves, options.output)
    return 0


def _plot(runs: Sequence[Run], options: Namespace) -> int:
    plot(runs, options.key or [runs[0].metric], options.x, options.smooth, options.output)
    return 0


def _export(runs: Sequence[Run], options: Namespace) -> int:
    count = export(runs, options.output)
    print(f"{count} records of {len(runs)} runs in {options.output}", file=sys.stderr)
    return 0


def _publish(runs: Sequence[Run], options: Namespace) -> int:
    if (options.to == "tensorboard-dir") != (options.dir is not None):
        raise UsageError("--to tensorboard-dir needs --dir DIR, and nothing else takes it")
    to = Destination(options.to, options.project, options.name, options.dir)
    print(publish(runs[0], to, options.follow), file=sys.stderr)
    return 0


def _verify(runs: Sequence[Run], options: Namespace) -> int:
    (run,) = runs
    findings = verify(run)
    if options.json:
        _print_json(findings)
    else:
        for finding in findings:
            print(printable(f"{finding.where}: {finding.what}"), flush=True)
        if not findings:
            print(f"{run.path}: as promised ({run.summary.records} records)", flush=True)
    return 1 if findings else 0


def _report(runs: Sequence[Run], options: Namespace) -> int:
    options.output.write_text(report(runs), encoding="utf-8")
    return 0


COMMANDS: dict[str, Callable[[Sequence[Run], Namespace], int]] = {
    "show": _show,
    "tail": _tail,
    "compare": _compare,
    "samples": _samples,
    "why": _why,
    "plot": _plot,
    "export": _export,
    "publish": _publish,
    "verify": _verify,
    "report": _report,
}


def _console() -> Console:
    """As wide as the terminal, or as COLUMNS says, but wide enough for a table: a narrower terminal
    wraps the lines. In a pipe nothing is cut off."""
    console = Console(highlight=False)
    fixed = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    console.width = max(console.width, 80) if fixed else 400
    return console


def _tell(found: Any, options: Namespace, told: Callable[[Any], RenderableType]) -> None:
    """What was found, as JSON or as `told` makes it for people."""
    if options.json:
        _print_json(found)
    else:
        _print(told(found))


def _print(what: RenderableType) -> None:
    console = _console()
    with console.capture() as text:
        console.print(what)
    print(text.get(), end="", flush=True)


def _print_json(value: Any) -> None:
    options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS
    # NaN becomes null
    print(orjson.dumps(value, default=str, option=options).decode(), flush=True)


def _tell_damage(runs: Sequence[Run]) -> None:
    for run in runs:
        told = run.damaged
        for line in told[:3]:
            print(f"launcher: not read: {line}", file=sys.stderr)
        if len(told) > 3:
            print(f"launcher: not read: {len(told) - 3} more in {run.path}", file=sys.stderr)
