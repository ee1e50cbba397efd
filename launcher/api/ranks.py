"""The ranks of a run on this machine, started from Python: what they print is shown here, a Ctrl-C
is theirs, and what the first of them failed with is raised."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from launcher.errors import RunError, UsageError
from launcher.telemetry.rundir import RunDirectory, read_json

# Where a rank leaves its last word: torchrun's name for it, which the guard writes to as well.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
# How long the others have after the first rank that failed: they tell of it, and end by themselves.
END_S = 60.0
POLL_S = 0.2


def run_ranks(argv: Sequence[str], count: int, directory: RunDirectory) -> None:
    """`launcher train ARGV` as so many ranks, to their end.

    Raises UsageError or RunError with what a rank ended with, KeyboardInterrupt where they were
    interrupted before their first step, or twice.
    """
    with tempfile.TemporaryDirectory(prefix="launcher-ranks-") as folder:
        words = [Path(folder) / f"rank{rank}.json" for rank in range(count)]
        ranks = _started(argv, words)
        try:
            with _interrupts(ranks) as interrupts:
                _watch(ranks)
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                rank.wait()
        codes = [rank.returncode for rank in ranks]
        if any(codes):
            if interrupts:
                raise KeyboardInterrupt("stopped at once, not after a step")
            raise _failure(codes, words, directory)


def _started(argv: Sequence[str], words: Sequence[Path]) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ours = (name for name in os.environ if not name.startswith("TORCHELASTIC_"))
    world = {
        **{name: os.environ[name] for name in ours},
        # Where the caller imports from, who may have added to it.
        "PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path),
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(len(words))),
    }
    command = [sys.executable, "-m", "launcher.cli.rank", *argv]
    return [
        subprocess.Popen(
            command,
            env={**world, "RANK": str(rank), "LOCAL_RANK": str(rank), ERROR_FILE: str(word)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C comes by way of this process alone
        )
        for rank, word in enumerate(words)
    ]


@contextmanager
def _interrupts(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Meanwhile an interrupt is for the ranks, which stop after a step; the list holds them."""
    found: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        found.append(number)
        for rank in ranks:
            rank.send_signal(number)

    if threading.current_thread() is not threading.main_thread():  # it gets none
        yield found
        return
    before = signal.signal(signal.SIGINT, pass_on)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)


def _watch(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Show what the ranks print, as it comes, until all have ended; those that outlive one that
    failed for too long are killed."""
    deadline = None
    with selectors.DefaultSelector() as open_:
        for rank in ranks:
            for pipe, shown in ((rank.stdout, sys.stdout), (rank.stderr, sys.stderr)):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
                open_.register(pipe, selectors.EVENT_READ, (shown, bytearray()))
        while True:
            alive = [rank for rank in ranks if rank.poll() is None]  # first: its last words count
            for key, _ in open_.select(POLL_S if alive else 0):
                shown, line = key.data
                if _copy(key.fileobj, shown, line, whole=not alive):
                    open_.unregister(key.fileobj)
            if not alive:
                return
            if deadline is None and any(rank.poll() for rank in ranks):
                deadline = time.monotonic() + END_S
            if deadline is not None and time.monotonic() > deadline:
                for rank in alive:
                    rank.kill()


def _copy(pipe: Any, shown: IO[str], kept: bytearray, whole: bool) -> bool:
    """Show the whole lines that have come; whether that was all. Ranks' lines are not mixed up."""
    over = False
    try:
        while piece := pipe.read(1 << 16):
            kept += piece
        over = piece == b""
    except BlockingIOError:
        pass
    end = len(kept) if over or whole else kept.rfind(b"\n") + 1
    if end:
        shown.write(kept[:end].decode(errors="replace"))
        shown.flush()
        del kept[:end]
    return over


def _failure(codes: Sequence[int], words: Sequence[Path], directory: RunDirectory) -> Exception:
    """What the ranks ended with, as an exception: a mistake of usage before a failure, the rank's
    own word before that of others about it."""
    told = {rank: word for rank, path in enumerate(words) if (word := read_json(path))}
    for word in told.values():
        if "usage" in word:
            return (UsageError if word["exit_code"] == 2 else RunError)(word["usage"])
    about_others = "RunError: rank "
    found = sorted(
        (str(word["message"]["message"]).startswith(about_others), rank)
        for rank, word in told.items()
    )
    if found:
        others, rank = found[0]
        said, more = told[rank]["message"]["message"], told[rank]["message"]["extraInfo"]
        if others:
            return RunError(said.removeprefix("RunError: "))
        return RunError(f"rank {rank} failed: {said}\n{more['py_callstack']}")
    ended = ", ".join(f"rank {rank}: {code}" for rank, code in enumerate(codes) if code)
    return RunError(f"ranks ended without a word ({ended}, exit codes); see {directory.logs}")
