"""`launcher.train` with ranks that it starts."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import launcher
from launcher.api import ranks
from launcher.api.settings import name_of
from launcher.errors import RunError, UsageError
from launcher.telemetry.rundir import RunDirectory
from tests.api.line import Line
from tests.api.test_train import CONFIG, assert_trained, by_hand
from tests.system import jobs

# The tests' root is not where the ranks would look by themselves.
sys.path.insert(0, str(jobs.ROOT))


def train(do: str = "", **how: Any) -> Any:
    asked = {"TASK.DO": do, "TASK.AT": 6, "TASK.RANK": 1}
    return launcher.train(CONFIG, Line, overrides=asked, ranks=2, **how)


def test_two_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    """They train as one process does, and what they say is heard here."""
    run = train()
    assert run.status.state == "completed"
    assert len(jobs.environment(Path("run"))["ranks"]) == 2
    assert_trained(run, by_hand(12))
    assert "done: 12 steps" in capfd.readouterr().err


@pytest.mark.slow
def test_what_a_rank_fails_with_is_raised(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="rank 1 failed: ZeroDivisionError: by hand\n") as error:
        train("step fail")
    assert "in train_step" in str(error.value) and "rank 1 on " in capfd.readouterr().err
    assert_trained(train(resume=True, allow=["TASK.DO"]), by_hand(12))


@pytest.mark.slow
def test_an_interrupt_is_the_ranks() -> None:
    before = signal.getsignal(signal.SIGINT)
    run = train("step ask parent")
    assert (run.status.state, run.status.reason) == ("stopped", "SIGINT")
    assert signal.getsignal(signal.SIGINT) is before
    assert_trained(train("step ask parent", resume=True), by_hand(12))


@pytest.mark.slow
def test_an_interrupt_while_ranks_start() -> None:
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        train()
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("do", "error", "told"),
    [
        ("empty", UsageError, "empty data set"),
        ("step die", RunError, "rank 1 on .* was killed from outside"),
    ],
)
def test_how_ranks_end(do: str, error: type, told: str) -> None:
    with pytest.raises(error, match=told):
        train(do)


def test_which_word_is_raised(tmp_path: Path) -> None:
    """The failing rank's own before the others' about it; a mistake of usage before both."""
    words = [tmp_path / f"{rank}.json" for rank in range(3)]
    directory = RunDirectory(tmp_path / "run")

    def found(codes: list[int]) -> Exception:
        return ranks._failure(codes, words, directory)

    assert "(rank 2: -9, exit codes)" in str(found([0, 0, -9]))
    more = {"py_callstack": "Traceback ...", "timestamp": "1"}
    about = {"message": "RunError: rank 1 on host failed first: OSError: x", "extraInfo": more}
    words[0].write_text(json.dumps({"message": about}))
    assert str(found([1, 1, 1])) == "rank 1 on host failed first: OSError: x"
    words[1].write_text(json.dumps({"message": {"message": "OSError: x", "extraInfo": more}}))
    assert str(found([1, 1, 1])) == "rank 1 failed: OSError: x\nTraceback ..."
    words[2].write_text(json.dumps({"usage": "the data set is empty", "exit_code": 2}))
    assert str(found([1, 1, 2])) == "the data set is empty"
    assert type(found([1, 1, 2])) is UsageError


def made_at_a_prompt() -> type:
    """A class as a notebook makes it: in a module that no file stands for."""
    place: dict[str, Any] = {"__name__": "__main__", "Line": Line}
    exec("class Mine(Line): pass", place)
    return place["Mine"]


def test_a_class_that_ranks_cannot_import(monkeypatch: pytest.MonkeyPatch) -> None:
    class Inside(Line):
        pass

    with pytest.raises(UsageError, match="move the class to the top level"):
        launcher.train(CONFIG, Inside, ranks=2)
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with pytest.raises(UsageError, match=r"%%writefile mine\.py"):
        launcher.train(CONFIG, made_at_a_prompt(), ranks=2)
    assert not Path("run").exists()
    # In this process both are trained.
    run = launcher.train(CONFIG, made_at_a_prompt())
    assert run.config["TASK.NAME"] == "__main__:Mine"
    assert_trained(run, by_hand(12))


def test_the_names_of_classes() -> None:
    from launcher.tasks.digits import Digits

    assert name_of(Digits) == "launcher.tasks.digits:Digits"
    assert name_of(Line) == "tests.api.line:Line"
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import line
    finally:
        sys.path.pop(0)
    assert name_of(line.Line) == f"{Path(__file__).with_name('line.py')}:Line"


def test_a_rank_starts_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match='if __name__ == "__main__"'):
        train()
    assert os.listdir() == []
