"""`launcher` in this process, and in one of its own."""

import sys
from pathlib import Path

from launcher import cli
from tests.system.jobs import Ended, Job


def run(words: str) -> object:
    """The exit code of `launcher WORDS`."""
    try:
        return cli.main(words.split())
    except SystemExit as ended:  # argparse's way out
        return ended.code


def launch(words: str, *options: str, **env: str) -> Ended:
    """`launcher WORDS` in the working directory, to its end; `options` are Python's own."""
    command = [sys.executable, *options, "-m", "launcher", *words.split()]
    return Job(command, env, Path.cwd()).wait()


def imported_by(words: str, code: int = 0) -> set[str]:
    """The packages that `launcher WORDS` imports; asserts how it ends."""
    ended = launch(words, "-X", "importtime")
    assert ended.code == code, ended.err[-2000:]
    return {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in ended.err.splitlines()
        if line.startswith("import time:")
    }
