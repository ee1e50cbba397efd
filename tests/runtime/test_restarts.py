"""What would only fail again is not started again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.runtime import restarts

ROOT = Path(restarts.__file__).parents[2]


@pytest.fixture
def attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Begin attempt N of a rank, as torchrun does."""

    def begin(number: int, local_rank: int = 0) -> None:
        folder = tmp_path / f"attempt_{number}" / str(local_rank)
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))

    return begin


def error(kind: type[Exception], text: str = "") -> Exception:
    try:
        raise kind(text)
    except Exception as caught:
        return caught


def test_the_same_failure_twice_in_a_row(attempts) -> None:
    attempts(0)
    assert not restarts.repeats(error(OSError, "port 1"), 0)
    attempts(1)
    assert restarts.repeats(error(OSError, "port 2"), 0)  # other words, the same line


def test_not_in_the_attempt_right_before(attempts) -> None:
    attempts(0)
    assert not restarts.repeats(error(OSError), 0)
    attempts(2)
    assert not restarts.repeats(error(OSError), 0)


@pytest.mark.parametrize(("kind", "step"), [(ValueError, 0), (OSError, 10)])
def test_another_failure(attempts, kind: type[Exception], step: int) -> None:
    attempts(0)
    assert not restarts.repeats(error(OSError), 0)
    attempts(1)
    assert not restarts.repeats(error(kind), step)


def test_at_another_line(attempts) -> None:
    attempts(0)
    assert not restarts.repeats(error(OSError), 0)
    attempts(1)
    try:
        raise OSError
    except OSError as caught:
        assert not restarts.repeats(caught, 0)


def test_any_rank_of_the_node(attempts) -> None:
    """Of two ranks that fail in the same attempt, neither repeats the other."""
    for rank in (0, 1):
        attempts(0, rank)
        assert not restarts.repeats(error(OSError), 0)
    attempts(1, 1)
    assert restarts.repeats(error(OSError), 0)


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert not restarts.repeats(error(OSError), 0)
    restarts.end_job("nobody to ask")


WORKER = "from launcher.runtime.restarts import end_job; end_job('why')"
# A torchrun with a shell between itself and its two ranks.
AGENT = """
import os, signal, subprocess, sys, time
count = 0
def told(*_):
    global count
    count += 1
signal.signal(signal.SIGTERM, told)
folder, left, worker = sys.argv[2:]
for rank in "01":
    os.makedirs(f"{folder}/attempt_3/{rank}")
    env = {
        **os.environ, "TORCHELASTIC_ERROR_FILE": f"{folder}/attempt_3/{rank}/error.json",
        "TORCHELASTIC_RESTART_COUNT": "3", "TORCHELASTIC_MAX_RESTARTS": str(3 + int(left)),
    }
    command = 'true; "$0" -c "$1"; true'
    subprocess.run(["bash", "-c", command, sys.executable, worker], env=env, check=True)
print(count)
"""


@pytest.mark.parametrize(
    ("name", "left", "asked"), [("torchrun", "1", 1), ("torchrun", "0", 0), ("other", "1", 0)]
)
def test_torchrun_is_asked_once(name: str, left: str, asked: int, tmp_path: Path) -> None:
    """And only where it would start the ranks again; nobody else is ended in its place."""
    folder = tmp_path / "logs"
    command = [sys.executable, "-c", AGENT, name, str(folder), left]
    ended = subprocess.run(
        [*command, WORKER], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout == f"{asked}\n"
    assert ended.stderr.count("launcher: why: torchrun is asked to end") == asked
