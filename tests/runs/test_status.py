"""What a run's status.json means, and the exit code that job files go on by."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.runs import main
from launcher.errors import RunError, UsageError
from launcher.runs.status import read_status
from launcher.telemetry.rundir import STALE_S


def run(path: Path, state: str, **changed: Any) -> Path:
    status = {
        **{"state": state, "step": 7, "epoch": 1, "reason": "", "updated": time.time()},
        **{"host": socket.gethostname(), "pid": os.getpid()},
    }
    (path / "status.json").write_text(json.dumps(status | changed))
    return path


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("state", "code"), [("completed", 0), ("failed", 1), ("running", 3), ("stopped", 75)]
)
def test_exit_code(
    state: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(run(tmp_path, state))]) == code
    assert capsys.readouterr().out.startswith(f"{state}: step 7, epoch 1, updated 20")


def test_a_dead_process_is_a_lost_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pid = dead()
    assert main(["status", "--json", str(run(tmp_path, "running", pid=pid))]) == 75
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "lost"
    assert found["reason"] == f"process {pid} on {socket.gethostname()} is gone"


@pytest.mark.parametrize(("age", "state"), [(STALE_S / 2, "running"), (STALE_S * 2, "lost")])
def test_a_run_elsewhere_is_lost_when_it_gives_no_sign(
    age: float, state: str, tmp_path: Path
) -> None:
    path = run(tmp_path, "running", host="elsewhere", updated=time.time() - age)
    assert read_status(path).state == state


def test_an_ended_run_is_never_lost(tmp_path: Path) -> None:
    path = run(tmp_path, "stopped", pid=dead(), updated=0.0)
    assert read_status(path).state == "stopped"


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        read_status(tmp_path)


def test_a_process_id_that_is_none_is_dead(tmp_path: Path) -> None:
    assert read_status(run(tmp_path, "running", pid=-5)).state == "lost"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"state": "odd", "step": 1, "epoch": 0}',
        '{"state": "running", "step": 1e999, "epoch": 0}',
        '{"state": "running", "step": 1, "epoch": 0, "updated": NaN}',
    ],
)
def test_a_status_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(RunError, match=r"status\.json cannot be read"):
        read_status(tmp_path)
