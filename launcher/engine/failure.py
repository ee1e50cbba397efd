"""The end of a run that fails: which rank was first, told once, on the console and in failure.json.

Every rank puts what happened to it on the board (runtime/board.py) before it leaves, so whoever
notices only that a connection is gone finds there why. Rank 0 writes; where it is gone, the lowest
living rank does. An error unwinds the main thread; where that is stuck, in a hang or in a backend
that does not tell of a peer's end (NCCL), the watch's thread ends the process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from launcher.config import CfgNode
from launcher.engine import telling
from launcher.engine.members import introduce
from launcher.errors import RunError, UsageError
from launcher.runtime import hang, restarts
from launcher.runtime.board import Unreachable
from launcher.runtime.memory import memory_budget, oom_kills
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.runtime.watch import LAST_WORDS_S, leave
from launcher.telemetry import rundir
from launcher.telemetry.rundir import RunDirectory

logger = logging.getLogger(__name__)
BEAT_S = 1.0
# A rank of another host that posts nothing for so long is taken for gone.
SILENT_S = 3.0
# For how long ranks that end by their watch wait for each other's stacks, and for the writer.
STACKS_S, WRITTEN_S = 4.0, 6.0


class FirstFailure(RunError):
    """What ended the run, where that was another rank; it has been told of already."""


@contextmanager
def watching(
    cfg: CfgNode, task_class: type, runtime: Runtime, directory: RunDirectory
) -> Iterator[Failures]:
    """Tell of any error inside, of a hang and of other ranks' errors, before it is raised.

    What the user must mend is raised as it is, as where the ranks disagree. Entering is a
    collective.
    """
    failures = Failures(runtime, directory, introduce(cfg, task_class, runtime), cfg)
    try:
        yield failures
    except BaseException as error:
        if isinstance(error, UsageError) and not isinstance(error, RunError):
            failures.refused(error)
            raise
        raise failures.failed(error) from None


class Failures:
    """Watches over one attempt; the same on every rank."""

    def __init__(
        self,
        runtime: Runtime,
        directory: RunDirectory,
        members: list[dict[str, Any]],
        cfg: CfgNode,
    ) -> None:
        """`members` are `hang.myself()` of all ranks."""
        self.runtime, self.directory, self.members = runtime, directory, members
        self.cfg, self.progress = cfg, Progress()  # replaced by the run's own when there is one
        self.host = members[runtime.rank]["host"]
        self.oom_kills = oom_kills()
        self.opened = False  # the directory, by this attempt; before, nothing in it is touched
        self.beats = 0
        self.beaten = 0.0  # when
        self.before: tuple[float, dict[int, hang.Beat]] | None = None
        runtime.watch.on_tick, runtime.watch.on_stall = self._tick, self._stall
        # At once: the others must know of a rank that freezes whether it was in such a phase.
        runtime.watch.on_alone = self._beat

    # In the main thread.

    def open(self) -> None:
        """The directory is this attempt's from now on."""
        self.opened = True
        self.runtime.watch.stacks = self.directory.log(self.runtime.rank).open("a")

    def failed(self, error: BaseException) -> BaseException:
        """Tell of this rank's error, or of the one of another rank behind it; what to raise."""
        watch = self.runtime.watch
        if not watch.begin_end():
            time.sleep(LAST_WORDS_S)  # the watch is telling of a hang, and ends this process
        logger.critical("this rank failed", exc_info=error, extra={"file_only": True})
        mine, lost = self._describe(error), lost_connection(error)
        if not (lost or watch.started) and restarts.repeats(error, self.progress.step):
            mine["final"] = "the attempt before failed likewise, before its first step"
        first = self._first(mine, lost)
        if writer := self._is_writer(first):
            self._write(first)
        if first["rank"] != self.runtime.rank:
            error = FirstFailure(telling.headline(first))
        error.__dict__["told"] = True
        telling.tell_torchrun(error)
        _end_if_final(first, writer)
        return error

    def refused(self, error: UsageError) -> None:
        """Let the other ranks know of what the user must mend, for it may be at this one alone."""
        if self.runtime.board is not None:
            with contextlib.suppress(Unreachable):
                final = {"final": "another try would end the same way"}
                self.runtime.board.first("failure", self._describe(error) | final)

    def _describe(self, error: BaseException) -> dict[str, Any]:
        text = telling.describe(error, self.cfg, self.runtime)
        trace = "".join(traceback.format_exception(error))
        return self._record(self.runtime.rank, text, "" if isinstance(error, UsageError) else trace)

    def _record(
        self,
        rank: int,
        exception: str,
        trace: str,
        step: int | None = None,
        silent: list[int] | None = None,
    ) -> dict[str, Any]:
        member = self.members[rank]
        return {
            "rank": rank,
            "host": member["host"],
            "pid": member["pid"],
            "step": self.progress.step if step is None else step,
            "exception": exception,
            "traceback": trace,
            "time": time.time(),
            "silent": silent or [],  # ranks that cannot speak for themselves; for other ranks only
        }

    def _first(self, mine: dict[str, Any], lost: bool) -> dict[str, Any]:
        """The first failure of all ranks."""
        board = self.runtime.board
        if board is None:
            return mine
        try:
            board.post("failed", True)
            if not lost:
                return board.first("failure", mine)
            # A rank that fails says so before its connections go. One that was killed does not:
            # its process is gone, or its host gives no sign of life.
            deadline = time.monotonic() + SILENT_S + 2 * BEAT_S
            watched = board.read("beat")
            while time.monotonic() < deadline:
                if (found := board.seen("failure")) is not None:
                    return found
                overdue = time.monotonic() > deadline - BEAT_S
                if gone := self._gone(watched if overdue else None):
                    return board.first("failure", self._killed(gone))
                time.sleep(0.2)
            return board.first("failure", mine)
        except Unreachable:
            gone = self._gone(None)
            if not gone and lost and not self._is_beside(0):
                gone = [0]  # the store went with its host
            return self._killed(gone) if gone else mine

    def _gone(self, watched: dict[int, hang.Beat] | None) -> list[int]:
        """Ranks that left without a word: on this host by their process, elsewhere by silence since
        `watched` was read."""
        board = self.runtime.board
        told, now = {}, {}
        if board is not None:
            with contextlib.suppress(Unreachable):
                told, now = board.read("failed"), board.read("beat")
        gone = []
        for rank in range(self.runtime.world_size):
            if rank == self.runtime.rank or rank in told:
                continue
            if self._is_beside(rank):
                dead = not self._lives(rank)
            else:
                dead = watched is not None and watched.get(rank) == now.get(rank)
            if dead:
                gone.append(rank)
        return gone

    def _killed(self, gone: list[int]) -> dict[str, Any]:
        """A failure record for ranks that vanished without an exception."""
        rank = gone[0]
        beat = self._last_beat(rank)
        others = f" (and ranks {gone[1:]})" if len(gone) > 1 else ""
        here = self._is_beside(rank)
        text = (
            f"rank {rank}{others} was killed from outside"
            if here
            else (
                f"rank {rank}{others} gives no sign of life: its host {self.members[rank]['host']} "
                "is down, or cannot be reached"
            )
        )
        if here and oom_kills() > self.oom_kills:
            text += ", by the kernel for want of memory (oom_kill of its cgroup rose)"
        if beat:
            text += f". It was last seen at step {beat['step']} ({beat['phase']})"
            text += f" with {beat['rss_gib']:.2f} GiB of memory"
        if here:
            text += f"; this host has {memory_budget().available / 2**30:.1f} GiB free now"
        return self._record(rank, text, "", beat.get("step"), gone)

    def _is_writer(self, first: dict[str, Any]) -> bool:
        """Whether this rank is the one to write: the lowest that lives, and no other has."""
        board, rank = self.runtime.board, self.runtime.rank
        if board is None:
            return True
        lower = [r for r in range(rank) if r not in first["silent"]]
        if any(self._is_beside(r) and self._lives(r) for r in lower):
            return False
        away = [r for r in lower if not self._is_beside(r)]
        try:
            if away:
                if any(r in board.read("failed") for r in away):
                    return False
                before = board.read("beat")
                time.sleep(SILENT_S)
                after = board.read("beat")
                if any(before.get(r) != after.get(r) for r in away):
                    return False
            return bool(board.first("writer", rank) == rank)
        except Unreachable:
            # The store lies on rank 0's host.
            return self._is_beside(0) or not self._owner_goes_on()

    def _owner_goes_on(self) -> bool:
        """Whether another rank tells of the end, where none can be asked: as long as rank 0 writes
        signs of life it is this host that is cut off; where it is frozen, the lowest rank of other
        hosts tells. The claim of a dead rank 0 is free, and nobody need wait for its silence."""
        try:
            if self.opened:
                self.directory.claim()
            return False
        except UsageError:
            ranks = range(self.runtime.world_size)
            home = self.members[0]["host"]
            if self.runtime.rank != next(r for r in ranks if self.members[r]["host"] != home):
                return True
            read = self.directory.read_status
            before = read()
            return hang.wait_until(lambda: read() != before, rundir.BEAT_S + 2)

    def _last_beat(self, rank: int) -> hang.Beat:
        """What a rank last posted, {} where that cannot be read."""
        if self.runtime.board is not None:
            with contextlib.suppress(Unreachable):
                return self.runtime.board.read("beat").get(rank, {})
        return {}

    def _is_beside(self, rank: int) -> bool:
        return bool(self.members[rank]["host"] == self.host)

    def _lives(self, rank: int) -> bool:
        return hang.is_alive(self.members[rank]["pid"], self.members[rank]["created"])

    # In the watch's thread.

    def _tick(self) -> None:
        watch, board = self.runtime.watch, self.runtime.board
        if board is None or time.monotonic() - self.beaten < BEAT_S:
            return
        self._beat()
        first = board.peek("failure")
        stuck = watch.age > SILENT_S and watch.phase not in hang.ALONE
        if first is None and watch.stop is not None and stuck and (gone := self._gone(None)):
            # What looked like a stop request is torchrun ending those that a killed rank left over.
            with contextlib.suppress(Unreachable):
                first = board.first("failure", self._killed(gone))
        # The main thread has the first word, so that it can close what is open, unless it is stuck.
        if first is not None and stuck and watch.begin_end():
            self._end(first)

    def _beat(self) -> None:
        watch, board = self.runtime.watch, self.runtime.board
        if board is None:
            return
        self.beaten = time.monotonic()
        self.beats += 1
        beat = {
            "n": self.beats,
            "collectives": self.runtime.collectives(),
            "phase": watch.phase,
            "step": self.progress.step,
            "age": watch.age,
            "limit": watch.limit,
            "rss_gib": hang.rss_gib(),
        }
        board.post("beat", beat)

    def _stall(self) -> None:
        """Nothing has moved for longer than it may: find out why, and end the run."""
        watch, board, rank = self.runtime.watch, self.runtime.board, self.runtime.rank
        if board is None:
            first = self._hung(rank, [])
        else:
            try:
                if self.before is None:
                    self.before = time.monotonic(), board.read("beat")
                    return
                if time.monotonic() - self.before[0] < SILENT_S:
                    return
                (_, before), self.before = self.before, None
                world = self.runtime.world_size
                verdict = hang.judge(before, board.read("beat"), world, watch.age, watch.limit)
                if verdict is None:
                    return
                first = board.first("failure", self._hung(*verdict))
            except Unreachable:
                # The store lies on rank 0's host, or is rank 0's own.
                away = (r for r in range(self.runtime.world_size) if not self._is_beside(r))
                blamed = 0 if rank else next(away, 0)
                first = self._hung(blamed, [] if blamed == rank else [blamed])
        if watch.begin_end():
            self._end(first)

    def _hung(self, rank: int, silent: list[int]) -> dict[str, Any]:
        watch = self.runtime.watch
        beat: hang.Beat = {"step": self.progress.step, "phase": watch.phase}
        if rank != self.runtime.rank:
            beat |= self._last_beat(rank)
        away = {r for r in range(self.runtime.world_size) if not self._is_beside(r)}
        if len({self.members[r]["host"] for r in away}) > 1 and away <= set(silent):
            # Not all of them at once.
            here = min(set(range(self.runtime.world_size)) - away)
            text = (
                f"hang: nothing has moved for {watch.age:.0f} s, and host {self.host} gets no sign "
                "of life from any other: it is cut off"
            )
            return self._record(here, text, "", None, silent)
        text = (
            f"hang: nothing has moved for {watch.age:.0f} s, and all ranks wait for rank {rank} "
            f"({beat['phase']}, {beat['step']} steps done)"
        )
        if rank in silent:
            text += ", which gives no sign of life"
            if not self._is_beside(rank):
                text += f": its host {self.members[rank]['host']} is down, or cannot be reached"
        # The others could not have finished a step without it.
        return self._record(rank, text, "", max(beat["step"], self.progress.step), silent)

    def _end(self, first: dict[str, Any]) -> None:
        """Say what is known, write it down where this rank is the one to, and leave.

        No rank leaves before all that can have told where they stand: a rank's end would unwind
        the main threads of the others, and torchrun would end them.
        """
        board, rank, silent = self.runtime.board, self.runtime.rank, first["silent"]
        # Not through logging, whose lock the main thread may hold.
        words = f"{first['exception']}\nthe stacks of this rank's threads:\n{hang.stacks()}\n"
        with contextlib.suppress(OSError):
            if self.opened:
                with self.directory.log(rank).open("a") as log:
                    log.write(words)
            else:
                os.write(2, words.encode())
        beside = [r for r in silent if self._is_beside(r) and r != rank]
        if board is not None:
            states = {r: hang.process_state(self.members[r]["pid"]) for r in beside}
            board.post("told", {rank: hang.main_stack(), **states})
            if writer := self._is_writer(first):
                self._write({**first, "traceback": first["traceback"] or self._stack_of(first)})
                board.post("written", True)
            else:
                hang.wait_until(lambda: self._told(1, "written"), WRITTEN_S)
            board.flush()
        else:
            writer = True
            self._write({**first, "traceback": hang.main_stack()})
        for other in beside:
            # torchrun would wait for a frozen rank for 30 s more.
            hang.kill(self.members[other]["pid"], self.members[other]["created"])
        telling.tell_torchrun(FirstFailure(telling.headline(first)))
        _end_if_final(first, writer)
        leave(1)

    def _stack_of(self, first: dict[str, Any]) -> str:
        """The stack of the rank to blame, or its process's state where it cannot tell; waits for
        all that can tell theirs."""
        board = self.runtime.board
        assert board is not None
        can_tell = self.runtime.world_size - len(first["silent"])
        hang.wait_until(lambda: self._told(can_tell, "told", "failed"), STACKS_S)
        with contextlib.suppress(Unreachable):
            for told in board.read("told").values():
                if (found := told.get(str(first["rank"]))) is not None:
                    return str(found)
        return ""

    def _told(self, ranks: int, *names: str) -> bool:
        """Whether so many ranks have posted one of these; also where nobody can be asked."""
        board = self.runtime.board
        assert board is not None
        try:
            return len({rank for name in names for rank in board.read(name)}) >= ranks
        except Unreachable:
            return True

    def _write(self, first: dict[str, Any]) -> None:
        telling.show(first, self.directory if self.opened else None)
        if not self.opened:
            return
        if not self.runtime.is_main and not take_over(self.directory, self.members[0]):
            return  # a successor has begun, or this failure has been told of
        told = {key: value for key, value in first.items() if key != "silent"}
        telling.write(told, self.directory, self.progress, own=first["rank"] == self.runtime.rank)


def lost_connection(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("gloo/", "Connection closed by peer", "Connection reset")
    )


def _end_if_final(first: dict[str, Any], writer: bool) -> None:
    """Keep torchrun from trying in vain. On every rank, since each node has a torchrun."""
    if "final" in first:
        time.sleep(0.0 if writer else 1.0)  # the writer may still be telling why
        restarts.end_job(first["final"])


def take_over(directory: RunDirectory, owner: dict[str, Any]) -> bool:
    """Claim the directory for a rank that tells of the end of `owner`, its rank 0.

    False where nothing is to be written: a successor has begun, or the end has been told of. An
    owner that is frozen keeps all others out, so then its ranks may write.
    """
    with contextlib.suppress(UsageError):
        directory.claim()
    status = directory.read_status()
    same = all(status.get(key) == owner[key] for key in ("host", "pid"))
    return same and status.get("state") == "running"
