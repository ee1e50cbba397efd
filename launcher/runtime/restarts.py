"""Restarts by torchrun, and how to keep it from those that would only fail again.

torchrun takes no hint from its workers: after any failure it starts them again, `--max-restarts`
times. But it ends, and all its ranks, when it is asked to by a signal. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import traceback
from pathlib import Path

import psutil

NOTE, ENDED = "launcher_failed", "launcher_ended"
# A word of its command line: the script, the module, or the module's file.
TORCHRUN = re.compile(r"torchrun$|torch[./]distributed[./](run|launch)\b")


def repeats(error: BaseException, step: int) -> bool:
    """Note that this attempt fails before its first step, with `step` done by those before it;
    whether the last attempt has failed at the same step, from the same line of code.

    Not whether with the same words: these may hold process ids, addresses or figures.
    """
    attempt = _attempt()
    if attempt is None:
        return False
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    note = f"{step} {type(error).__qualname__} {place}"
    number = int(attempt.name.rpartition("_")[2])
    before = attempt.with_name(f"attempt_{number - 1}") / NOTE
    with contextlib.suppress(OSError):
        with (attempt / NOTE).open("a") as notes:  # several ranks of a node may fail
            notes.write(f"{note}\n")
        return note in before.read_text().splitlines()
    return False


def end_job(why: str) -> None:
    """Have this node's torchrun end its ranks and itself, where it would start them again.

    The caller leaves right afterwards; torchrun has noticed the signal before it sees that.
    """
    attempt, agent = _attempt(), _agent()
    left = _number("TORCHELASTIC_MAX_RESTARTS") - _number("TORCHELASTIC_RESTART_COUNT")
    if attempt is None or agent is None or left <= 0:
        return
    # Once a node: a second signal would break off torchrun's own way out.
    with contextlib.suppress(OSError, psutil.Error):
        (attempt / ENDED).touch(exist_ok=False)
        print(f"launcher: {why}: torchrun is asked to end", file=sys.stderr, flush=True)
        agent.send_signal(signal.SIGTERM)


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else 0


def _attempt() -> Path | None:
    """The folder that torchrun keeps on this node for this attempt, beside those of the attempts
    before: .../attempt_<restarts>/<local rank>/error.json."""
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    found = file.parent.parent
    return found if found.name == f"attempt_{_number('TORCHELASTIC_RESTART_COUNT')}" else None


def _agent() -> psutil.Process | None:
    """The torchrun above this process: the first that was not itself given its variables, as a
    script between the two was."""
    mine = os.environ.get("TORCHELASTIC_ERROR_FILE")
    with contextlib.suppress(psutil.Error, OSError):
        for process in psutil.Process().parents():
            if process.environ().get("TORCHELASTIC_ERROR_FILE") != mine:
                # If torchrun is dead, this is whoever adopts orphans: not ours to end.
                words = process.cmdline()
                return process if any(TORCHRUN.search(word) for word in words) else None
    return None
