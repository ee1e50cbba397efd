"""What a process that was killed, or that native code ended, leaves for those that outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.edges.native import last_words

SCRIPT = """
import os, subprocess, sys
from pathlib import Path
from launcher.edges.native import Stderr
kept = Stderr()
kept.keep(Path(sys.argv[1]))
print("a last line", file=sys.stderr, flush=True)
exec(sys.argv[2])
"""


def ended(path: Path, how: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SCRIPT, str(path), how]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE)
    process.wait(60)
    return process


def told(*files: tuple[Path, int], seconds: float = 10.0) -> Any:
    end = time.monotonic() + seconds
    while (found := last_words(dict(enumerate(files)))) is None and time.monotonic() < end:
        time.sleep(0.02)
    return found


def test_of_one_that_was_killed_it_is_known_that_it_said_nothing(tmp_path: Path) -> None:
    killed = ended(tmp_path / "stderr", "os.kill(os.getpid(), 9)")
    assert told((tmp_path / "stderr", killed.pid)) == (0, "", [])
    assert "a last line" in (tmp_path / "stderr").read_text()
    assert told((tmp_path / "stderr", killed.pid + 1), seconds=0.2) is None  # of another attempt


@pytest.mark.parametrize("others", [0, 1])
def test_of_one_that_native_code_ended_there_are_its_words(tmp_path: Path, others: int) -> None:
    aborted = ended(tmp_path / "stderr", "os.abort()")
    killed = [ended(tmp_path / "other", "os.kill(os.getpid(), 9)")] * others
    files = [(tmp_path / "other", process.pid) for process in killed]
    for one in files:
        assert told(one) == (0, "", [])
    rank, end, lines = told(*files, (tmp_path / "stderr", aborted.pid))
    assert rank == others and "SIGABRT" in end
    assert lines[0] == "a last line" and not any(line.startswith("end of") for line in lines)


def test_its_children_may_still_speak(tmp_path: Path) -> None:
    child = "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True)"
    killed = ended(tmp_path / "stderr", f"{child}; os.kill(os.getpid(), 9)")
    assert told((tmp_path / "stderr", killed.pid), seconds=0.5) is None
    assert killed.stdout is not None
    os.kill(int(killed.stdout.readline()), signal.SIGKILL)
    assert told((tmp_path / "stderr", killed.pid)) == (0, "", [])


def test_one_that_ends_by_itself_leaves_nothing(tmp_path: Path) -> None:
    ended(tmp_path / "stderr", "import time; time.sleep(0.5); kept.close()")
    time.sleep(0.5)
    assert not (tmp_path / "stderr").exists()
