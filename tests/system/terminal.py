"""A command on a terminal, for debuggers that wait for somebody to type."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from tests.system import jobs


class Terminal:
    """`launcher ...`, or another command line, with a terminal as its standard streams."""

    def __init__(
        self,
        *words: object,
        command: Sequence[str] = ("-m", "launcher"),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.ours, theirs = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *command, *map(str, words)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=jobs.clean_environment(env or {}),
            cwd=jobs.ROOT,
            start_new_session=True,
        )
        os.close(theirs)
        self.seen = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        jobs.kill_family(self.process.pid)
        self.process.wait()
        os.close(self.ours)

    def _read(self) -> Iterator[str]:
        if select.select([self.ours], [], [], 0.5)[0]:
            try:
                yield os.read(self.ours, 1 << 16).decode(errors="replace")
            except OSError:  # the other side is closed
                time.sleep(0.1)

    def until(self, words: str, timeout: float = 120) -> str:
        """What comes up to these words, which are taken with it."""
        deadline = time.monotonic() + timeout
        while words not in self.seen:
            assert time.monotonic() < deadline, self.seen
            self.seen += "".join(self._read())
        before, _, self.seen = self.seen.partition(words)
        return before

    def type(self, line: str) -> None:
        os.write(self.ours, f"{line}\n".encode())

    def end(self) -> int:
        deadline = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.seen
            self.seen += "".join(self._read())
        return self.process.returncode
