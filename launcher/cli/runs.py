"""`launcher runs status ...`: reading runs back."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path

from launcher.runs.status import read_status


def main(argv: list[str]) -> int:
    """Run the command. `status` exits 0 completed, 75 stopped or lost, 1 failed, 3 running."""
    p = argparse.ArgumentParser(prog="launcher runs", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True, metavar="status")
    status = commands.add_parser(
        "status",
        help="how a run is doing; exits 0 completed, 75 stopped or lost, 1 failed, 3 running",
    )
    status.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    status.add_argument("--json", action="store_true", help="print JSON instead of a line")
    options = p.parse_args(argv)
    return _status(options.run, options.json)


def _status(run: Path, as_json: bool) -> int:
    found = read_status(run)
    if as_json:
        print(json.dumps(vars(found), indent=2))
    else:
        when = datetime.fromtimestamp(found.updated).isoformat(" ", "seconds")
        reason = f" ({found.reason})" if found.reason else ""
        print(f"{found.state}{reason}: step {found.step}, epoch {found.epoch}, updated {when}")
    return found.exit_code
