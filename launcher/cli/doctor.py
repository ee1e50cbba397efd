"""`launcher doctor`: one page on a machine, and on a config on it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.api.attempt import check_task
from launcher.cli.arguments import split_overrides
from launcher.config import load_config
from launcher.config.checks import evaluates
from launcher.config.keys import defaults
from launcher.errors import UsageError
from launcher.runtime.topology import read_topology
from launcher.tasks import resolve_task
from launcher.telemetry.rundir import RunDirectory

if TYPE_CHECKING:
    from launcher.debug.doctor.findings import Finding

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="launcher doctor",
        usage="launcher doctor [--config-file FILE] [OPTIONS] [KEY VALUE | KEY=VALUE ...]",
        description="Look at this machine, and with a config at whether it can do that run, and "
        "whether the run's first steps can be repeated bit for bit. Under torchrun or srun the "
        "ranks are compared. Exits 1 where there is a problem. Writes nothing.",
        allow_abbrev=False,
    )
    p.add_argument(
        "--config-file", metavar="FILE", help="the run's YAML config, or the name of one that ships"
    )
    p.add_argument(
        "--steps",
        type=int,
        default=3,
        metavar="N",
        help="steps of the determinism check, which needs a config (default: 3; 0: none)",
    )
    p.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    p.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)
    return p


def main(argv: list[str]) -> int:
    """Run `launcher doctor ARGV`; returns the exit code, raises UsageError."""
    options, overrides = split_overrides(parser(), argv)
    if options.steps < 0:
        raise UsageError(f"--steps must be at least 0, not {options.steps}")
    topology = read_topology(os.environ)
    given = options.config_file is not None or bool(overrides)
    config = load_config(options.config_file, overrides, resolve_task) if given else None
    cfg = config.cfg if config else defaults()
    if config is not None:
        check_task(config, evaluates(cfg))

    # From here on torch is needed, which takes seconds to import.
    from launcher.callbacks import resolve
    from launcher.debug.doctor.examine import examine
    from launcher.engine.run import Job

    job = None
    if config is not None:
        assert config.task is not None  # load_config demands one
        search = [Path(options.config_file).parent] if options.config_file else []
        callbacks = resolve(cfg.CALLBACKS, [*search, Path.cwd()])
        job = Job(cfg, config.task, RunDirectory(cfg.OUTPUT_DIR), callbacks=callbacks)
    page = examine(topology, cfg, job, options.steps)
    if page is None:
        return 0  # rank 0 speaks for all
    if options.json:
        print(json.dumps([{**asdict(f), "ranks": ranks} for f, ranks in page], indent=2))
    else:
        _print(page, topology.world_size)
    return int(any(finding.state == "problem" for finding, _ in page))


def _print(page: Sequence[tuple[Finding, list[int]]], world_size: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from launcher.debug.doctor.ranks import named

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    topic = ""
    for finding, ranks in page:
        who = f" ({named(ranks)})" if 0 < len(ranks) < world_size else ""
        first = finding.topic if finding.topic != topic else ""
        topic = finding.topic
        state = Text(finding.state, STYLES[finding.state])
        told = Text(finding.found + who)
        table.add_row(Text(first, "bold"), state, Text(finding.name), told)
        if finding.remedy:
            table.add_row("", "", "", Text(f"-> {finding.remedy}"))
    console = Console(highlight=False)
    # In a pipe nothing is cut off or wrapped.
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS", "").isdigit():
        console.width = 1000
    with console.capture() as text:
        console.print(table)
    lines = [line.rstrip() for line in text.get().splitlines()]
    counts = [sum(f.state == state for f, _ in page) for state in ("problem", "warning", "ok")]
    print("\n".join(lines))
    print("\nproblems: {}, warnings: {}, ok: {}".format(*counts), flush=True)
