"""Guards of several ranks in one process, with a clock of their own and a store between them."""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launcher.errors import UsageError
from launcher.guard.board import Unreachable
from launcher.guard.guard import TICK_S, Guard
from launcher.guard.stop import Signals
from launcher.runtime.member import Member
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology
from launcher.telemetry.rundir import RunDirectory
from tests.engine.helpers import ALONE, config
from tests.system import jobs

HERE = Member.here()
ELSEWHERE = Member("elsewhere", 1)
# A process that has been on this host.
ENDED = Member(HERE.host, HERE.pid, created=1.0)
LOST = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")


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
    others unless `met` is False, by rank. `members` says which of them are processes of this test;
    they have one progress."""

    def __init__(
        self,
        folder: Path,
        members: Sequence[Member],
        *words: object,
        store: dist.Store | None = None,
        signals: Signals | None = None,
        leave: Callable[[int], None] | None = None,
        met: bool = True,
    ) -> None:
        self.now, self.codes, self.busy = 0.0, dict[int, int](), set[int]()
        self.run, self.guards, self.progress = folder / "run", dict[int, Guard](), Progress()
        store, world = store or dist.HashStore(), len(members)
        cfg = config("DIST.INIT_TIMEOUT", "30s", "DIST.TRAIN_TIMEOUT", "20s", *words)
        (self.run / "logs").mkdir(parents=True)
        owner = {"host": members[0].host, "pid": members[0].pid}
        (self.run / "status.json").write_text(json.dumps({"state": "running", **owner}))
        for rank in (r for r, member in enumerate(members) if member == HERE):
            topology = Topology(rank, rank, world, world, "srun" if world > 1 else "python")
            directory = (Claimed if members[0] == HERE else RunDirectory)(self.run)
            guard = Guard(
                cfg, topology, directory, self.progress, signals, self, leave or self.leave
            )
            if met:
                guard.meet(replace(ALONE, topology=topology, store=store), members)
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
        return jobs.status(self.run)

    def assert_told(self, rank: int, words: str, by: int | None = None) -> None:
        """A rank's failure was told once, and ended the run."""
        told, status = self.told, self.status
        assert told["rank"] == rank and by in (None, told["told_by"])
        assert words in told["exception"]
        assert status["state"] == "failed" and status["reason"].endswith(told["exception"])
        assert [record["rank"] for record in jobs.history(self.run)] == [rank]
