"""What a run's status.json means, the exit code that job files go on by, and whether they start a
run again: until it is completed, but not for ever."""

from __future__ import annotations

import json
import os
import re
import socket
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
from tests.runs.made import GONE

HOST = socket.gethostname()
Captured = pytest.CaptureFixture[str]


def ended(run: Path, state: str, step: int = 7, silent: float = 0.0, **changed: Any) -> Path:
    """A run of which an attempt ended in this state, with a checkpoint at `step`."""
    (run / f"checkpoints/step_{step}").mkdir(parents=True, exist_ok=True)
    status = {"state": state, "step": step, "epoch": 1, "updated": time.time() - silent}
    status |= {"host": HOST, "pid": os.getpid()}
    (run / "status.json").write_text(json.dumps(status | changed))
    return run


SILENT = r"lost \(no sign of life from far for 2\d\d s\)"


@pytest.mark.parametrize(
    ("state", "changed", "code", "told"),
    [
        ("completed", {}, 0, "completed"),
        ("failed", {}, 1, "failed"),
        ("stopped", {"pid": GONE, "silent": STALE_S * 2}, 75, "stopped"),
        ("running", {}, 3, "running"),
        ("running", {"host": "far", "silent": STALE_S / 2}, 3, "running"),
        ("running", {"host": "far", "silent": STALE_S * 2}, 75, SILENT),
        ("running", {"pid": GONE}, 75, rf"lost \(process {GONE} on {re.escape(HOST)} is gone\)"),
        ("running", {"pid": -5}, 75, rf"lost \(process -5 on {re.escape(HOST)} is gone\)"),
    ],
)
def test_a_state_and_its_exit_code(
    state: str, changed: dict[str, Any], code: int, told: str, tmp_path: Path, capsys: Captured
) -> None:
    """A run is lost that says it is running, and cannot be."""
    path = str(ended(tmp_path, state, **changed))
    assert main(["status", path]) == code
    assert re.match(rf"{told}: step 7, epoch 1, updated 20", capsys.readouterr().out)
    assert main(["status", path, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert re.fullmatch(told, f"{found['state']} ({found['reason']})".removesuffix(" ()"))


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        read_status(tmp_path)


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


def ask(run: Path, *attempt: Any, **changed: Any) -> int:
    """The code that is told after an attempt that ended so, or that left no trace."""
    if attempt:
        ended(run, *attempt, **changed)
    return main(["status", str(run), "--again", str(run.with_name("notes"))])


def test_until_it_is_completed(run: Path, capsys: Captured) -> None:
    """A run that was killed is lost: it goes on."""
    codes = [ask(run), ask(run, "stopped", 10), ask(run, "failed", 20)]
    codes += [ask(run, "running", 30, pid=GONE), ask(run, "completed", 40)]
    assert codes == [75, 75, 75, 75, 0]
    assert capsys.readouterr().out.splitlines() == [
        "the first attempt, from step 0",
        "stopped at step 10, to go on",
        "failed at step 20, to go on",
        "lost at step 30, to go on",
        "completed",
    ]


def test_two_attempts_in_vain(run: Path, capsys: Captured) -> None:
    codes = [ask(run, "stopped", 10), ask(run, "failed", 10)]
    codes += [ask(run, "stopped", 11), ask(run), ask(run)]  # progress: the count begins anew
    assert codes == [75, 75, 75, 75, 1]
    told = "stopped, and 2 attempts in a row made no progress (step 11)\n"
    assert capsys.readouterr().out.endswith(told)


def test_a_run_that_never_begins(run: Path) -> None:
    assert [ask(run), ask(run), ask(run)] == [75, 75, 1]
    assert not run.exists()


def test_a_person_asked_to_stop(run: Path, capsys: Captured) -> None:
    ended(run, "stopped", 10)
    (run / "STOP").touch()
    assert ask(run) == 75  # whoever starts a job wants it to run: the attempt takes STOP away
    assert ask(run, "stopped", 20) == 1
    assert f"asked not to go on by {run / 'STOP'}" in capsys.readouterr().out


def test_a_rank_0_killed_elsewhere_is_waited_for(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its sign of life is overdue; one that gives another is another job's."""
    assert ask(run) == 75
    assert ask(run, "running", 10, host="elsewhere", silent=STALE_S - 1) == 75

    def sleep(seconds: float) -> None:
        ended(run, "running", 11, host="elsewhere")

    monkeypatch.setattr(module.time, "sleep", sleep)
    assert ask(run, "running", 10, host="elsewhere", silent=5) == 3


def test_notes_that_cannot_be_read(run: Path, capsys: Captured) -> None:
    run.with_name("notes").write_text("?")
    assert call(main, ["status", str(run), "--again", str(run.with_name("notes"))]) == 2
    assert "notes cannot be read" in capsys.readouterr().err
