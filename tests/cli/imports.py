"""What a command imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imported_by(words: list[str], code: int, cwd: Path) -> set[str]:
    """The packages that `launcher WORDS` imports; asserts how it ends."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "launcher", *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == code, done.stderr[-2000:]
    return {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
