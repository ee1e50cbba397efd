"""The end of a run that fails: which rank was first, told once, on the console and in failure.json.

Every rank tells the board (runtime/board.py) what happened to it before it leaves, so whoever
notices only that a connection is gone finds there why. Rank 0 writes; where it is gone, the lowest
living rank does.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from launcher.config import CfgNode
from launcher.errors import RunError, UsageError
from launcher.runtime import hang, restarts
from launcher.runtime.board import Unreachable
from launcher.runtime.memory import memory_budget, oom_kills
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.runtime.watch import LAST_WORDS_S, leave
from launcher.telemetry.rundir import RunDirectory

logger = logging.getLogger(__name__)
BEAT_S = 1.0
# A rank of another host that posts nothing for so long is taken for gone.
SILENT_S = 3.0
LOG_LINES, TRACE_LINES = 50, 20  # in failure.json; on the console


class FirstFailure(RunError):
    """What ended the run, where that was another rank; it has been told of already."""


class Failures:
    """Watches over one attempt from its directory's opening on; the same on every rank."""

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

    # In the main thread.

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
        if writer := self._is_writer():
            self._write(first)
        if first["rank"] != self.runtime.rank:
            error = FirstFailure(_headline(first))
        error.__dict__["told"] = True
        tell_torchrun(error)
        _end_if_final(first, writer)
        return error

    def refused(self, error: UsageError) -> None:
        """Let the other ranks know of what the user must mend, for it may be at this one alone."""
        if self.runtime.board is not None:
            with contextlib.suppress(Unreachable):
                final = {"final": "another try would end the same way"}
                self.runtime.board.first("failure", self._describe(error) | final)

    def _describe(self, error: BaseException) -> dict[str, Any]:
        text = f"{type(error).__name__}: {error}".strip(": ")
        if isinstance(error, torch.OutOfMemoryError):
            text = f"{text}\n{self._memory_hint()}"
        trace = "".join(traceback.format_exception(error))
        return self._record(self.runtime.rank, text, "" if isinstance(error, UsageError) else trace)

    def _memory_hint(self) -> str:
        train, device, figures = self.cfg.TRAIN, self.runtime.device, ""
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            peak = torch.cuda.max_memory_allocated(device)
            figures = (
                f"{device} has {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of it free; this "
                f"rank took {peak / 2**30:.1f} GiB at most. "
            )
        share = -(-train.BATCH_SIZE // self.runtime.world_size)
        micro = min(share, train.MICRO_BATCH_SIZE or share)
        return (
            f"{figures}{micro} samples were put through the model at once (TRAIN.BATCH_SIZE "
            f"{train.BATCH_SIZE} over {self.runtime.world_size} ranks, TRAIN.MICRO_BATCH_SIZE "
            f"{train.MICRO_BATCH_SIZE}). TRAIN.MICRO_BATCH_SIZE {max(1, micro // 2)} needs about "
            "half the memory, and trains the same; EVAL.BATCH_SIZE is that of evaluations "
            f"({self.cfg.EVAL.BATCH_SIZE})."
        )

    def _record(self, rank: int, exception: str, trace: str, step: int | None = None) -> dict:
        member = self.members[rank]
        return {
            "rank": rank,
            "host": member["host"],
            "pid": member["pid"],
            "step": self.progress.step if step is None else step,
            "exception": exception,
            "traceback": trace,
            "time": time.time(),
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
        for rank, member in enumerate(self.members):
            if rank == self.runtime.rank or rank in told:
                continue
            if member["host"] == self.host:
                dead = not hang.is_alive(member["pid"], member["created"])
            else:
                dead = watched is not None and watched.get(rank) == now.get(rank)
            if dead:
                gone.append(rank)
        return gone

    def _killed(self, gone: list[int]) -> dict[str, Any]:
        """A failure record for ranks that vanished without an exception."""
        rank = gone[0]
        beat: dict[str, Any] = {}
        if self.runtime.board is not None:
            with contextlib.suppress(Unreachable):
                beat = self.runtime.board.read("beat").get(rank, {})
        others = f" (and ranks {gone[1:]})" if len(gone) > 1 else ""
        here = self.members[rank]["host"] == self.host
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
        memory = memory_budget()
        if beat:
            text += f". It was last seen at step {beat['step']} ({beat['phase']})"
            text += f" with {beat['rss_gib']:.2f} GiB of memory"
        if here:
            text += f"; this host has {memory.available / 2**30:.1f} GiB free now"
        return self._record(rank, text, "", beat.get("step"))

    def _is_writer(self) -> bool:
        """Whether no rank below this one lives."""
        board, rank = self.runtime.board, self.runtime.rank
        if rank == 0 or board is None:
            return True
        lower = range(rank)
        if any(
            self.members[r]["host"] == self.host
            and hang.is_alive(self.members[r]["pid"], self.members[r]["created"])
            for r in lower
        ):
            return False
        away = [r for r in lower if self.members[r]["host"] != self.host]
        try:
            if not away or any(r in board.read("failed") for r in away):
                return not away
            before = board.read("beat")
            time.sleep(SILENT_S)
            after = board.read("beat")
        except Unreachable:
            return True
        return all(before.get(r) == after.get(r) for r in away)

    # In the watch's thread.

    def _tick(self) -> None:
        watch, board = self.runtime.watch, self.runtime.board
        if board is None or time.monotonic() - self.beaten < BEAT_S:
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
        if watch.stop is not None and watch.phase != "end" and watch.age > SILENT_S:
            self._look_for_failure()

    def _look_for_failure(self) -> None:
        """What looks like a stop request may be torchrun ending the ranks that another's failure
        left over, and NCCL lets them wait for that one in vain."""
        assert self.runtime.board is not None
        try:
            first = self.runtime.board.seen("failure")
            if first is None and (gone := self._gone(None)):
                first = self.runtime.board.first("failure", self._killed(gone))
        except Unreachable:
            return
        if first is not None and self.runtime.watch.begin_end():
            self._end(first, writer=self._is_writer())

    def _stall(self) -> None:
        """Nothing has moved for longer than it may: find out why, and end the run."""
        watch, board, world = self.runtime.watch, self.runtime.board, self.runtime.world_size
        if board is None:
            if watch.begin_end():
                self._end(self._hung(self.runtime.rank, alive=True), writer=True)
            return
        silent: list[int] = []
        try:
            if self.before is None:
                # Whoever is blamed is overdue itself, and so has told where it stands by then.
                board.post("stack", hang.main_stack())
                self.before = time.monotonic(), board.read("beat")
                return
            if time.monotonic() - self.before[0] < SILENT_S:
                return
            (_, before), self.before = self.before, None
            verdict = hang.judge(before, board.read("beat"), world, watch.age, watch.limit)
            if verdict is None:
                return
            blamed, silent = verdict
            first = self._hung(blamed, alive=blamed not in silent)
            if not watch.begin_end():
                return
            first = board.first("failure", first)
        except Unreachable:
            # The store lies on rank 0's host, or is rank 0's own.
            if not watch.begin_end():
                return
            away = (r for r, m in enumerate(self.members) if m["host"] != self.host)
            first = self._hung(0 if self.runtime.rank else next(away, 0), alive=False)
            silent = [first["rank"]]
        lowest = next((r for r in range(world) if r not in silent), self.runtime.rank)
        self._end(first, writer=self.runtime.rank == lowest, silent=silent)

    def _hung(self, rank: int, alive: bool) -> dict[str, Any]:
        watch = self.runtime.watch
        beat: dict[str, Any] = {"step": self.progress.step, "phase": watch.phase}
        if self.runtime.board is not None and rank != self.runtime.rank:
            with contextlib.suppress(Unreachable):
                beat = self.runtime.board.read("beat").get(rank, beat)
        text = (
            f"hang: nothing has moved for {watch.age:.0f} s, and all ranks wait for rank {rank} "
            f"({beat['phase']}, {beat['step']} steps done)"
        )
        if not alive:
            text += ", which gives no sign of life"
        # The others could not have finished a step without it.
        return self._record(rank, text, "", max(beat["step"], self.progress.step))

    def _end(self, first: dict[str, Any], writer: bool, silent: list[int] | None = None) -> None:
        """Say what is known, write it down where this rank is the one to, and leave."""
        board, rank = self.runtime.board, self.runtime.rank
        mine = hang.stacks()
        # Not through logging, whose lock the main thread may hold.
        with contextlib.suppress(OSError), self.directory.log(rank).open("a") as log:
            log.write(f"{first['exception']}\nthe stacks of this rank's threads:\n{mine}\n")
        blamed = self.members[first["rank"]]
        beside = [r for r in silent or [] if self.members[r]["host"] == self.host and r != rank]
        if board is not None and first["rank"] in beside:
            board.post("look", hang.process_state(blamed["pid"]))
        if writer:
            first["traceback"] = first["traceback"] or self._look_at(first["rank"], beside)
            self._write(first)
        for other in beside:
            # torchrun would wait for a frozen rank for 30 s more.
            hang.kill(self.members[other]["pid"], self.members[other]["created"])
        tell_torchrun(FirstFailure(_headline(first)))
        _end_if_final(first, writer)
        leave(1)

    def _look_at(self, rank: int, beside: list[int]) -> str:
        """The stack of a rank, or its process's state where it cannot tell."""
        board = self.runtime.board
        if rank == self.runtime.rank or board is None:
            return hang.main_stack()
        if rank in beside:
            return hang.process_state(self.members[rank]["pid"])
        found: list[str] = []

        def told() -> bool:
            with contextlib.suppress(Unreachable):
                stack = board.read("stack").get(rank)
                found.extend([stack] if stack else board.read("look").values())
            return bool(found)

        hang.wait_until(told, 4.0)
        return found[0] if found else ""

    def _write(self, first: dict[str, Any]) -> None:
        self._print(first)
        if not self.opened or not self.directory.take_over(self.members[0]):
            return  # not begun, or a successor has begun
        first = {**first, "log": _tail(self.directory.log(first["rank"]))}
        reason = first["exception"]
        if first["rank"] != self.runtime.rank:
            reason = f"rank {first['rank']} on {first['host']}: {reason}"
        self.directory.write_failure(first)
        self.directory.write_status("failed", self.progress.as_dict(), reason)
        self.directory.write_history("failure", first["step"], rank=first["rank"], reason=reason)

    def _print(self, first: dict[str, Any]) -> None:
        trace = [line for line in first["traceback"].splitlines() if line.strip(" ^~")]
        if trace and trace[-1] == first["exception"]:
            del trace[-1]  # the headline has it
        lines = [_headline(first), *trace[-TRACE_LINES:]]
        if self.opened:
            log = self.directory.log(first["rank"])
            lines.append(f"see {self.directory.failure} and {log}")
        with contextlib.suppress(OSError):
            print(*[f"launcher: {line}" for line in lines], sep="\n", file=sys.stderr)


def lost_connection(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("gloo/", "Connection closed by peer", "Connection reset")
    )


@record
def _raise(error: BaseException) -> None:
    raise error


def tell_torchrun(error: BaseException) -> None:
    """Write torchrun's own error file, whose first entry it shows as the root cause."""
    with contextlib.suppress(BaseException):
        _raise(error)


def _end_if_final(first: dict[str, Any], writer: bool) -> None:
    """Keep torchrun from trying in vain. On every rank, since each node has a torchrun."""
    if "final" in first:
        time.sleep(0.0 if writer else 1.0)  # the writer may still be telling why
        restarts.end_job(first["final"])


def _headline(first: dict[str, Any]) -> str:
    return (
        f"rank {first['rank']} on {first['host']} failed first, {first['step']} steps done: "
        f"{first['exception']}"
    )


def _tail(log: Path) -> list[str]:
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            return [line.rstrip("\n") for line in deque(lines, LOG_LINES)]
    except OSError:
        return []
