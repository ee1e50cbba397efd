"""Guards of several ranks in one process, with a clock of their own and a store between them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.config import CfgNode, load_config
from launcher.errors import UsageError
from launcher.guard.board import Unreachable
from launcher.guard.guard import TICK_S, Guard
from launcher.guard.stop import Signals
from launcher.runtime.cpu import CpuBudget
from launcher.runtime.member import Member
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology
from launcher.telemetry.rundir import RunDirectory

HERE = Member.here()
ELSEWHERE = Member("elsewhere", 1)
# A process that has been on this host.
ENDED = Member(HERE.host, HERE.pid, created=1.0)
LOST = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")


def config(*words: object) -> CfgNode:
    return load_config(None, [str(word) for word in words], require_task=False).cfg


class Left(BaseException):
    """In place of the process's end."""


class Gone(dist.Store):
    """A store that does not answer."""

    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("no route to host")

    set = compare_set = get = multi_get = check  # type: ignore[assignment]


class Claimed(RunDirectory):
    """One whose rank 0 lives, in the eyes of the others."""

    def claim(self, wait_s: float = 0.0) -> None:
        raise UsageError("in use")


class Ranks:
    """The clock of all, whose `sleep` lets the others act; and each rank's guard that has met the
    others, by rank. `members` says which of them are processes of this test."""

    def __init__(
        self,
        folder: Path,
        members: Sequence[Member],
        store: dist.Store | None = None,
        words: Sequence[object] = ("DIST.INIT_TIMEOUT", "30s", "DIST.TRAIN_TIMEOUT", "20s"),
        progress: Progress | None = None,
        signals: Signals | None = None,
        leave: Callable[[int], None] | None = None,
    ) -> None:
        self.now, self.codes, self.busy = 0.0, dict[int, int](), set[int]()
        self.run, self.guards = folder / "run", dict[int, Guard]()
        store, world, cfg = store or dist.HashStore(), len(members), config(*words)
        (self.run / "logs").mkdir(parents=True)
        owner = {"host": members[0].host, "pid": members[0].pid}
        (self.run / "status.json").write_text(json.dumps({"state": "running", **owner}))
        for rank in (r for r, member in enumerate(members) if member == HERE):
            topology = Topology(
                rank, rank, world, world, launched_by="srun" if world > 1 else "python"
            )
            directory = (Claimed if members[0] == HERE else RunDirectory)(self.run)
            guard = Guard(
                cfg, topology, directory, progress or Progress(), signals, self, leave or self.leave
            )
            guard.meet(
                Runtime(topology, torch.device("cpu"), CpuBudget(1, 1, 1, ""), store), members
            )
            guard.open()
            self.guards[rank] = guard

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for rank in self.guards:
            self.tick(rank)

    def leave(self, code: int) -> None:
        raise Left(code)

    def tick(self, rank: int) -> None:
        """A look around by a rank that is there and not at something."""
        if rank not in self.busy and rank not in self.codes:
            self.busy.add(rank)
            try:
                self.guards[rank].tick()
                # What it has posted or asked is on the board before the clock goes on.
                with contextlib.suppress(Unreachable):
                    self.guards[rank].board.read("beat")
            except Left as left:
                self.codes[rank] = left.args[0]
            self.busy.discard(rank)

    def stall(self, seconds: float = 60.0) -> None:
        """Let nothing move for so long, or until all have left."""
        until = self.now + seconds
        while self.now < until and len(self.codes) < len(self.guards):
            self.sleep(TICK_S)

    def fail(self, rank: int, error: BaseException) -> BaseException | None:
        """Raise an error in a rank's main thread; what comes out of its guard."""
        self.busy.add(rank)
        try:
            with self.guards[rank]:
                raise error
        except BaseException as found:
            return found
        finally:
            self.codes[rank] = 1

    @property
    def told(self) -> dict[str, Any]:
        return json.loads((self.run / "failure.json").read_text())

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.run / "status.json").read_text())

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "history.jsonl").open()]
