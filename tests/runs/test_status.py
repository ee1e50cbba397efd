"""What a run's status.json means, the exit code that job files go on by, and whether they start a
run again: until it is completed, but not for ever."""

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

from launcher.cli import call
from launcher.cli.runs import main
from launcher.errors import RunError, UsageError
from launcher.runs import again as module
from launcher.runs.status import read_status
from launcher.telemetry.rundir import STALE_S


def ended(run: Path, state: str, step: int | None = 7, **changed: Any) -> Path:
    """A run of which an attempt ended in this state, with a checkpoint at `step`."""
    run.mkdir(exist_ok=True)
    if step is not None:
        (run / f"checkpoints/step_{step}").mkdir(parents=True, exist_ok=True)
    status = {
        **{"state": state, "step": step or 0, "epoch": 1, "reason": "", "updated": time.time()},
        **{"host": socket.gethostname(), "pid": os.getpid()},
    }
    (run / "status.json").write_text(json.dumps(status | changed))
    return run


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
    assert main(["status", str(ended(tmp_path, state))]) == code
    assert capsys.readouterr().out.startswith(f"{state}: step 7, epoch 1, updated 20")


def test_a_dead_process_is_a_lost_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pid = dead()
    assert main(["status", "--json", str(ended(tmp_path, "running", pid=pid))]) == 75
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "lost"
    assert found["reason"] == f"process {pid} on {socket.gethostname()} is gone"


@pytest.mark.parametrize(("age", "state"), [(STALE_S / 2, "running"), (STALE_S * 2, "lost")])
def test_a_run_elsewhere_is_lost_when_it_gives_no_sign(
    age: float, state: str, tmp_path: Path
) -> None:
    path = ended(tmp_path, "running", host="elsewhere", updated=time.time() - age)
    assert read_status(path).state == state


def test_an_ended_run_is_never_lost(tmp_path: Path) -> None:
    path = ended(tmp_path, "stopped", pid=dead(), updated=0.0)
    assert read_status(path).state == "stopped"


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        read_status(tmp_path)


def test_a_process_id_that_is_none_is_dead(tmp_path: Path) -> None:
    assert read_status(ended(tmp_path, "running", pid=-5)).state == "lost"


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


# Again


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def ask(run: Path) -> int:
    return main(["status", str(run), "--again", str(run.with_name("notes"))])


def test_until_it_is_completed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(run) == 75  # before the first attempt
    for state, step in (("stopped", 10), ("failed", 20), ("stopped", 30)):
        ended(run, state, step)
        assert ask(run) == 75
    ended(run, "completed", 40)
    assert ask(run) == 0
    _, _, *told = capsys.readouterr().out.splitlines()
    assert told == ["failed at step 20, to go on", "stopped at step 30, to go on", "completed"]


def test_two_attempts_in_vain(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended(run, "stopped", 10)
    assert ask(run) == 75
    ended(run, "failed", 10)
    assert ask(run) == 75
    ended(run, "stopped", 11)  # progress: the count begins anew
    assert ask(run) == 75
    assert ask(run) == 75  # an attempt that left no trace at all
    assert ask(run) == 1
    assert "2 attempts in a row made no progress (step 11)" in capsys.readouterr().out


def test_a_run_that_never_begins(run: Path) -> None:
    assert [ask(run), ask(run), ask(run)] == [75, 75, 1]
    assert not run.exists()


def test_a_person_asked_to_stop(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended(run, "stopped", 10)
    (run / "STOP").touch()
    assert ask(run) == 75  # whoever starts a job wants it to run: the attempt takes STOP away
    ended(run, "stopped", 20)
    assert ask(run) == 1
    assert f"asked not to go on by {run / 'STOP'}" in capsys.readouterr().out


def test_a_killed_run_is_lost(run: Path) -> None:
    assert ask(run) == 75
    ended(run, "running", 10, pid=dead())
    assert ask(run) == 75


def test_a_rank_0_killed_elsewhere_is_waited_for(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its sign of life is overdue; one that gives another is another job's."""
    assert ask(run) == 75
    ended(run, "running", 10, host="elsewhere", updated=time.time() - 119)
    assert ask(run) == 75

    def sleep(seconds: float) -> None:
        ended(run, "running", 11, host="elsewhere", updated=time.time())

    ended(run, "running", 10, host="elsewhere", updated=time.time() - 5)
    monkeypatch.setattr(module.time, "sleep", sleep)
    assert ask(run) == 3


def test_notes_that_cannot_be_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.with_name("notes").write_text("?")
    assert call(main, ["status", str(run), "--again", str(run.with_name("notes"))]) == 2
    assert "notes cannot be read" in capsys.readouterr().err
