"""A process that native code ends (SIGSEGV, SIGABRT, SIGBUS, ...), and its last words.

It can tell nobody itself. What it wrote on stderr, and the stacks that Python's faulthandler adds,
are in a file beside its log, for the ranks that outlive it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

OF = "stderr of process {}"  # the first line
# How faulthandler begins, and what each of its words stands for.
FATAL = "Fatal Python error: "
SIGNALS = {
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "Floating-point exception": "SIGFPE",
    "Illegal instruction": "SIGILL",
    "Segmentation fault": "SIGSEGV",
}
MOST, LINES = 1 << 20, 15  # bytes of a file; what is told of them
SAID = "end of " + OF  # the last one, once nobody can write more
# A process of its own copies, for this one's end comes without warning; it is nobody's child, so
# that it is not ended with the rank's children, and heeds no signal meant for them.
COPY = """exec 3<&0; trap "" INT TERM HUP USR1
{ tee -a "$0" <&3 3<&-; [ ! -e "$0" ] || echo "$1" >> "$0"; } &"""


class Stderr:
    """This process's stderr. Where that is a terminal only the stacks are kept: whoever copied
    would take the terminal from those who draw on it."""

    path: Path | None = None  # where it is kept

    def keep(self, path: Path) -> None:
        """Keep it in this file until `close`."""
        with contextlib.suppress(OSError):  # a full disk: nothing is kept
            self._begin(path)
            self.path = path
            if os.isatty(2):
                faulthandler.enable(path.open("a"))
                return
            reader, writer = os.pipe()
            command = ["sh", "-c", COPY, str(path), SAID.format(os.getpid())]
            subprocess.run(command, stdin=reader, stdout=2, check=True)
            os.close(reader)
            os.dup2(writer, 2)
            os.close(writer)
            faulthandler.enable(2)

    def trim(self) -> None:
        """Begin the file anew where it has become long."""
        with contextlib.suppress(OSError):
            if self.path is not None and self.path.stat().st_size > MOST:
                self._begin(self.path)

    def close(self) -> None:
        """There are no last words."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _begin(self, path: Path) -> None:
        path.write_text(f"{OF.format(os.getpid())}\n")


def last_words(files: Mapping[int, tuple[Path, int]]) -> tuple[int, str, list[str]] | None:
    """Of processes that are gone, by rank with their file and id, the first that native code has
    ended: its rank, how it ended, and its last lines (what it wrote, and the stack of the thread
    that ran). The first rank and nothing where none was ended so; None where that is not known yet.
    """
    said = 0
    for rank, (path, pid) in files.items():
        lines = []
        with contextlib.suppress(OSError):
            lines = path.read_text(errors="replace").splitlines()
        if lines[-1:] == [SAID.format(pid)]:
            lines.pop()
            said += 1
        ends = [i for i, line in enumerate(lines) if line.startswith(FATAL)]
        if ends and lines[0] == OF.format(pid):
            word, stacks = lines[ends[-1]].removeprefix(FATAL), lines[ends[-1] :]
            running = [i for i, line in enumerate(stacks) if line.startswith("Current thread")]
            stack = stacks[running[0] :] if running else stacks
            told = f" was ended by {SIGNALS.get(word, word)}, from its own native code"
            return rank, told, [*lines[1 : ends[-1]][-LINES:], *stack[:LINES]]
    return (next(iter(files)), "", []) if said == len(files) else None
