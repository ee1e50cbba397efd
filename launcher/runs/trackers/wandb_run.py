"""A run in Weights & Biases; where that is, and whether offline, its own variables say (WANDB_MODE,
WANDB_DIR, WANDB_ENTITY, ...)."""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import wandb
from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import Record as Item

from launcher.errors import RunError
from launcher.runs.status import EXIT_CODES
from launcher.runs.trackers import Memory, Published, Record, Tracker

# Of wandb's log of a session: LevelDB's format, after a header of its own.
HEADER, BLOCK, FIRST, LAST = 7, 1 << 15, (1, 2), (1, 4)
WRITTEN_S = 10.0
ASIDE = "incomplete-"


class WandbRun(Tracker):
    """Config keys are wandb's config. Each record is one row, whose number is wandb's own step; the
    run's `step` is a value in it, and the axis of all others.

    wandb tells of no error in writing: so what it has on disk is read again at the end of a
    session, before any of it counts as sent. A session that was killed is set aside (renamed, so
    that `wandb sync` passes it over), and sent again.
    """

    at_once = False

    def open(self, run: Published, memory: Memory, remember: Callable[[], None]) -> bool:
        self.memory, self.remember = memory, remember
        if left := memory.pop("session", None):
            _set_aside(Path(left))
        # No look at the machine: it is not the one that trains.
        settings = wandb.Settings(
            silent=True,
            console="off",
            x_disable_stats=True,
            x_disable_meta=True,
            disable_code=True,
            disable_git=True,
        )
        self.run: Any = wandb.init(
            project=run.project, id=run.key, name=run.name, resume="allow", settings=settings
        )
        self.folder = Path(self.run.dir).parent
        memory["session"] = str(self.folder)
        remember()
        self.there, self.sent = int(self.run.step), 0  # rows that wandb's server has
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.configure(run)  # in each session: they are logs of their own until they are uploaded
        return True

    def configure(self, run: Published) -> list[str]:
        self.run.config.update(run.config, allow_val_change=True)
        return []

    def send(self, first: int, records: Sequence[Record]) -> None:
        for number, record in enumerate(records, first):
            if number >= self.there:
                self.run.log({**record, "_timestamp": record["time"]}, step=number)
                self.sent += 1

    def finish(self, state: str, reason: str, at: float) -> None:
        self.run.summary.update({"launcher/state": state, "launcher/reason": reason})
        self.run.finish(exit_code=0 if state == "running" else EXIT_CODES[state])
        log = self.folder / f"run-{self.run.id}.wandb"
        limit = time.monotonic() + WRITTEN_S
        while (there := rows(log)) < self.sent and time.monotonic() < limit:
            time.sleep(0.1)  # wandb's own process writes it
        if there != self.sent:
            raise RunError(
                f"wandb has written {there} of {self.sent} records to {log}: is its disk full?"
            )
        self.memory.pop("session")

    def abandon(self) -> None:
        with contextlib.suppress(Exception):  # the error at hand is the one to tell
            self.run.finish(exit_code=1)


def _set_aside(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        folder.rename(folder.with_name(f"{ASIDE}{folder.name}"))


def rows(log: Path) -> int:
    """How many rows wandb's log of a session holds, up to where it ends or is torn."""
    count = 0
    with contextlib.suppress(OSError, DecodeError):
        for piece in _pieces(log.read_bytes()):
            count += Item.FromString(piece).HasField("history")
    return count


def _pieces(data: bytes) -> Iterator[bytes]:
    at, piece = HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if left < HEADER or kind == 0:  # the rest of the block is empty
            at += left
            continue
        begin, at = at + HEADER, at + HEADER + length
        piece = data[begin:at] if kind in FIRST else piece + data[begin:at]
        if kind in LAST and at <= len(data):
            yield piece
