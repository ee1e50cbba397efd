"""What git says of a folder: its commit, and how the files differ from it. Imports no torch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

TIMEOUT_S = 20.0
UNKNOWN = "# git did not tell the difference\n"
CUT = "\n# cut here: the difference goes on\n"


def ask(folder: Path, *words: str, most: int = 1 << 16) -> str | None:
    """What a git command prints about a folder, at most so many bytes and then CUT; None where it
    fails, or there is no git."""
    # Without optional locks nothing is written into the repository.
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(folder), *words]
    try:
        ended = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=True, env=env)
    except (OSError, subprocess.SubprocessError):
        return None
    text = ended.stdout[:most].decode(errors="replace")
    return text + CUT if len(ended.stdout) > most else text


def commit(folder: Path) -> str:
    """The commit of the repository that holds a folder; "" where none does, or ignores it, as it
    does a virtual environment inside it."""
    if ask(folder, "check-ignore", "-q", ".") is not None:
        return ""
    return (ask(folder, "rev-parse", "HEAD") or "").strip()


def difference(folder: Path, most: int) -> str:
    """How the tracked files of that repository differ from its commit; "" where they do not, and a
    line that says so where git does not tell it, or not in time."""
    words = ("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv")
    # From the root: of the whole repository, wherever in it the folder lies.
    top = ask(folder, "rev-parse", "--show-toplevel")
    told = ask(Path(top.rstrip("\n")), *words, most=most) if top else None
    return UNKNOWN if told is None else told
