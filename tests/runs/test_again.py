"""Whether a job file starts a run again: until it is completed, but not for ever."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.cli.runs import main
from launcher.runs import again as module


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def ended(run: Path, state: str, step: int | None, **changed: object) -> None:
    """What an attempt leaves that ended in this state, with a checkpoint at `step`."""
    run.mkdir(exist_ok=True)
    if step is not None:
        (run / f"checkpoints/step_{step}").mkdir(parents=True, exist_ok=True)
    status = {
        **{"state": state, "step": step or 0, "epoch": 0, "reason": "", "updated": time.time()},
        **{"host": socket.gethostname(), "pid": os.getpid()},
    }
    (run / "status.json").write_text(json.dumps(status | changed))


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
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    ended(run, "running", 10, pid=process.pid)
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
    from launcher.cli import call

    run.with_name("notes").write_text("?")
    assert call(main, ["status", str(run), "--again", str(run.with_name("notes"))]) == 2
    assert "notes cannot be read" in capsys.readouterr().err
