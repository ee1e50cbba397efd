"""Whether the work goes on, watched in a thread of each rank, and how a run ends that cannot go on.

Every rank posts what it is at on a board beside the process group. What ends the run is one
`Failure`, the first that is posted. Who posted it tells of it, on the console and in failure.json;
rank 0 says so in the run's status and history. Where the board does not answer, a rank leaves the
word to those for whom it does, and speaks where nobody else has.

The thread waits for no collective, and for no file or lock of the loop's until it ends the process.
Where even this thread cannot run, because native code holds Python's lock (the GIL), faulthandler's
timer, which needs no lock, writes the stacks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
import traceback
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import IO, Any

import psutil
import torch.distributed as dist

from launcher.config import CfgNode, seconds
from launcher.edges import flight
from launcher.edges.native import Stderr, last_words
from launcher.errors import Ended, RunError, UsageError
from launcher.guard import stop
from launcher.guard.board import Board, Unreachable
from launcher.guard.failure import Failure, describe, lost_connection, show, tell_torchrun
from launcher.guard.hang import ALONE, Beat, in_debugger, judge, process_state, stacks
from launcher.guard.members import introduce
from launcher.log import get_logger
from launcher.runtime import process
from launcher.runtime.member import Member
from launcher.runtime.memory import memory_budget, oom_kills
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology
from launcher.telemetry.rundir import RunDirectory

logger = get_logger(__name__)
TICK_S, BEAT_S = 0.5, 1.0
SILENT_S = 3.0  # a rank that posts nothing for so long gives no sign of life
GRACE_S = 10.0  # before the ranks have met, joining raises earlier, with better words
TIMER_S = 1.5  # faulthandler's timer goes off so much later than this thread would have noticed
# For how long ranks that end wait for each other's stacks, the one that tells, and last words.
STACKS_S, TOLD_S, WORDS_S = 4.0, 6.0, 1.0
# For how long a rank that has no board waits for the word of others, who judge, collect and write.
OTHERS_S = SILENT_S + STACKS_S + TOLD_S
# For how long rank 0, of which nobody knows whether it is dead, may still write the run's end.
OWNER_S = 12.0
LAST_WORDS_S = 30.0  # in which an ending rank must have told and left


class Guard:
    """Watches over one attempt; the same on every rank. Alone ends a rank.

    A context, in which its thread runs. `join` makes the ranks known to each other; from then on a
    failure of one is told once for all. `open` says that the run directory is this attempt's;
    before, nothing in it is touched. At the context's end an error is told of, the process group is
    taken down, and what was told is raised as Ended. What the user must mend (a UsageError that is
    no RunError, or any before the ranks have met) is raised as it is.
    """

    def __init__(
        self,
        cfg: CfgNode,
        topology: Topology,
        directory: RunDirectory,
        progress: Progress,
        signals: stop.Signals | None = None,
        clock: Any = time,
        leave: Callable[[int], None] = stop.leave,
    ) -> None:
        """Requests to stop come by `signals`, if given. For tests: `clock` has the `monotonic` and
        `sleep` of the module time, `leave` ends the process."""
        self.cfg, self.topology, self.directory, self.progress = cfg, topology, directory, progress
        self.rank, self.is_main = topology.rank, topology.is_main
        self.clock, self.leave = clock, leave
        self.limits = _limits(cfg)
        self.stop: str | None = None  # why this rank was asked to stop
        self.phase = "start"
        self.age = 0.0  # seconds since something moved
        now = clock.monotonic()
        self._deadlines = stop.deadlines(cfg, now)
        self._oom_kills, self._parent = oom_kills(), os.getppid()
        self._moves = self._seen_moves = 0
        self._ticked, self._beat_at = now, now - BEAT_S
        self._beat: Beat | None = None  # the last one posted
        self._reading: tuple[float, dict[int, Beat]] | None = None  # the first of two in a hang
        self._signalled_at: float | None = None
        self._troubled = False
        self._ending, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)
        self._signals = signals or stop.Signals()
        # Until `join`, and in one process, a rank is by itself.
        self._runtime: Runtime | None = None
        self.board = Board(dist.HashStore(), self.rank, topology.world_size)
        self._members: Sequence[Member] = ()
        # By `open`.
        self._margin: stop.StopMargin | None = None
        self._samples, self._stderr = 0, Stderr()
        self._timer_file: IO[Any] | None = None

    # In the main thread.

    def __enter__(self) -> Guard:
        self._thread.start()
        return self

    def join(self, task_class: type) -> Runtime:
        """Set the process up and meet the other ranks. A collective. Raises UsageError where ranks
        have another config, other versions or other code, RunError where they do not come."""
        runtime = process.start(self.topology, self.cfg)
        self.meet(runtime, introduce(self.cfg, task_class, runtime))
        return runtime

    def meet(self, runtime: Runtime, members: Sequence[Member]) -> None:
        """Know the other ranks and share a board with them from now on; the end of `join`."""
        if runtime.store is not None:
            self.board.close()
            self.board = Board(runtime.store, self.rank, len(members))
        self._runtime, self._members = runtime, members
        self._signals.wake()  # for the first beat, of a rank that may be gone within a second

    def open(self, keep_stderr: bool = False) -> None:
        """The directory is this attempt's from now on, with this rank's stderr for the others."""
        assert self._runtime is not None
        if keep_stderr:
            self._stderr.keep(self.directory.stderr(self.rank))
        self._timer_file = self.directory.log(self.rank).open("a")
        self._samples = self.progress.samples
        self._margin = stop.StopMargin(self.progress, self._runtime.device.type, self.clock)

    def enter(self, phase: str) -> None:
        """Say what comes next: "start", "data", "step", "evaluate", "summarize", "save" or "end";
        this is progress. Cheap enough for every step, and never raises."""
        before, self.phase = self.phase, phase
        self._moves += 1
        if phase != before and {phase, before} & ALONE:
            # At once: the others must know of a rank that freezes whether it was in such a phase.
            self._signals.wake()
            self._stderr.trim()

    def request_stop(self, reason: str) -> None:
        """Ask all ranks to stop after a step they agree on; the first reason counts."""
        if self.stop is None and self.phase != "end":
            self.stop = reason
            if self.is_main:
                stop.say(f"{reason}: stopping after this step, with a checkpoint")

    def look_for_stop_file(self) -> None:
        """Take the file STOP for a request. Not for this object's own thread: files may stall."""
        with contextlib.suppress(OSError):
            if self.directory.stop.exists():
                self.request_stop("file STOP")

    def saved(self, seconds: float) -> None:
        """Take note of how long a save took: a stop must begin so much earlier."""
        if self._margin is not None:
            self._margin.longest_save_s = max(self._margin.longest_save_s, seconds)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        told = False
        try:
            if error is None:
                self.enter("end")
            elif self._begin_end():
                told = self._failed(error)
            else:
                self._thread.join(LAST_WORDS_S)  # it is telling of a hang, and leaves
            process.end()
        finally:
            self._close()
        if told:
            raise Ended(getattr(error, "exit_code", 1)) from None

    def _failed(self, error: BaseException) -> bool:
        """Tell of this rank's error, or of that of another rank behind it; False where the error is
        for its caller to show."""
        exception = describe(error, self.cfg, self.topology.world_size)
        trace = "" if isinstance(error, UsageError) else "".join(traceback.format_exception(error))
        mine = self._failure(self.rank, exception, traceback=trace)
        self.board.post("stacks", {})  # nobody need wait for one
        if isinstance(error, UsageError) and not (isinstance(error, RunError) and self._members):
            # It may be at this rank alone. Then rank 0 tells of it, for torchrun ends this one
            # before the command has spoken.
            self.board.post("told", True)
            with contextlib.suppress(Unreachable):
                self._agreed(replace(mine, told_by=0))
            return False
        logger.critical("this rank failed", exc_info=error, extra={"file_only": True})
        lost = self.topology.distributed and bool(self._members) and lost_connection(error)
        self._tell(self._first(mine, lost), error)
        return True

    def _first(self, mine: Failure, lost: bool) -> Failure:
        """The first failure of all ranks; `lost`: mine is only that a connection is gone."""
        deadline = self.clock.monotonic() + SILENT_S + 2 * BEAT_S
        try:
            # A rank that fails says so before its connections go. One that was killed does not:
            # its process is gone, or its host gives no sign of life.
            watched = self._beats() if lost else {}
            while lost and (now := self.clock.monotonic()) < deadline:
                if first := self._others_failure(watched if now > deadline - BEAT_S else None):
                    return first
                self.clock.sleep(0.2)
            return self._agreed(mine)
        except Unreachable:
            gone = self._gone(None)
            if not gone and lost and not self._members[0].is_beside():
                gone = [0]  # the store went with its host
            return self._others_word() or (self._killed(gone) if gone else mine)

    def _close(self) -> None:
        self._closed.set()
        self._signals.wake()
        self._thread.join(5.0)
        self.board.close()
        faulthandler.cancel_dump_traceback_later()
        if self._timer_file is not None:
            self._timer_file.close()
        self._stderr.close()

    # In the guard's own thread.

    def _run(self) -> None:
        while True:
            self._surviving(self._take_signals)
            if self._closed.is_set():
                return
            self.tick()

    def tick(self) -> None:
        """Look around; the thread does so every TICK_S seconds, and at each signal."""
        now = self.clock.monotonic()
        # A process that was frozen (SIGSTOP, a suspended machine) has not watched meanwhile.
        elapsed, self._ticked = min(now - self._ticked, 2 * TICK_S), now
        self.age = self.age + elapsed if self._moves == self._seen_moves else 0.0
        self._seen_moves = self._moves
        for look in (self._post_beat, self._look_at_time, self._look_at_others, self._look_at_age):
            if not self._closed.is_set():
                self._surviving(look)

    def _surviving(self, act: Callable[[], None]) -> None:
        """Nobody watches where this thread has ended: no descriptor left, say, or a full disk."""
        try:
            act()
        except Exception as error:
            if not self._troubled:
                self._troubled = True
                stop.say(f"{self.topology}: trouble in watching the run: {error!r}")
            self._closed.wait(TICK_S)  # the wait for signals may be what failed

    def _take_signals(self) -> None:
        for number in self._signals.wait(TICK_S):
            now, name = self.clock.monotonic(), signal.Signals(number).name
            if self._signalled_at is None:
                self._signalled_at = now
                self._take_first(name)
            elif now - self._signalled_at > stop.SAME_REQUEST_S:
                stop.say(f"{name} again: leaving at once")
                self.leave(1)

    def _take_first(self, name: str) -> None:
        if self.topology.launched_by == "torchrun":
            # The kernel tells of a parent's death a moment before the parent is another.
            self.clock.sleep(0.2)
        if os.getppid() != self._parent:
            name = f"{self.topology.launched_by} died"
        if self._margin is None and not (self._runtime and self.topology.distributed):
            # Nothing is made yet, and no other rank waits for this one.
            stop.say(f"{name}: stopped before the first step")
            self.leave(stop.STOPPED)
        self.request_stop(name)

    @property
    def limit(self) -> float:
        """Seconds that the phase at hand may take without a move."""
        starts = self._starts and self.phase in ("data", "step")
        return self.limits["start" if starts else self.phase]

    @property
    def _starts(self) -> bool:  # this attempt's first step is not done yet
        return self._margin is None or self.progress.samples == self._samples

    def _post_beat(self) -> None:
        now, last = self.clock.monotonic(), self._beat
        turned = last and last.phase != self.phase and {last.phase, self.phase} & ALONE
        if self._runtime is None or (now - self._beat_at < BEAT_S and not turned):
            return
        rss = 0
        with contextlib.suppress(OSError, psutil.Error):  # no descriptor left
            rss = psutil.Process().memory_info().rss
        number, collectives = last.number + 1 if last else 0, self._runtime.collectives()
        here = self.phase, self.progress.step, self.age, self.limit, rss / 2**30
        self._beat_at, self._beat = now, Beat(number, collectives, *here)
        self.board.post("beat", asdict(self._beat))

    def _look_at_time(self) -> None:
        if self.is_main and self._margin is not None:
            for what, deadline in self._deadlines.items():
                if self.clock.monotonic() + self._margin() >= deadline:
                    self.request_stop(what)

    def _look_at_others(self) -> None:
        """End with a rank that has failed or was killed, where the main thread is stuck (NCCL does
        not tell of a peer's end). Else it has the first word, to close what is open."""
        if self.age > SILENT_S and self._members and self.phase not in {"end", *ALONE}:
            with contextlib.suppress(Unreachable):
                if first := self._others_failure(None):
                    self._end(first)

    def _look_at_age(self) -> None:
        """Whether something has moved lately enough; else find out why not, and end the run."""
        if self.age > self.limit and in_debugger():
            self.age = 0.0
        if self.age <= self.limit:
            self._reading = None
            if self._timer_file is not None and self.phase != "end":
                # Armed again each tick (53 microseconds). It ends nothing: a process that was
                # frozen by its scheduler finds its time over when it wakes.
                left = self.limits["start" if self._starts else "step"] + TIMER_S
                faulthandler.dump_traceback_later(left, file=self._timer_file)
            return
        faulthandler.cancel_dump_traceback_later()  # the stacks are told below
        if self.phase == "end":
            stop.say(f"could not end within {LAST_WORDS_S:g} s: leaving")
            self.leave(1)
        elif self._members:
            self._judge()
        elif self.age > self.limit + GRACE_S:
            stop.say(f"{self.topology}: nothing has moved for {self.age:.0f} s. {stacks()}")
            self.leave(1)

    def _judge(self) -> None:
        """Compare two readings of the board, some time apart, for the rank that all wait for."""
        try:
            now = self.clock.monotonic()
            if self._reading is None:
                self._reading = now, self._beats()
            elif now - self._reading[0] >= SILENT_S:
                (_, before), self._reading = self._reading, None
                verdict = judge(before, self._beats(), len(self._members), self.age, self.limit)
                if verdict is not None:
                    self._end(self._agreed(self._hung(*verdict)))
        except Unreachable:
            # The store lies on rank 0's host, or is rank 0's own.
            away = (r for r, member in enumerate(self._members) if not member.is_beside())
            blamed = 0 if self.rank else next(away, 0)
            self._end(self._hung(blamed, [blamed] if blamed != self.rank else []), agreed=False)

    def _end(self, first: Failure, agreed: bool = True) -> None:
        """Say what is known, and leave; `agreed`: the failure stands on the board. No rank leaves
        before all that can have told where they stand, for its end would unwind the others."""
        if not self._begin_end():
            return
        try:
            # Not through logging, whose lock the main thread may hold.
            words = f"{first.exception}\nthe stacks of this rank's threads:\n{stacks()}\n"
            if self._margin is None:
                stop.say(words)
            else:
                with contextlib.suppress(OSError), self.directory.log(self.rank).open("a") as log:
                    log.write(words)
            beside = [r for r in first.silent if r != self.rank and self._members[r].is_beside()]
            states = {r: process_state(self._members[r].pid) for r in beside}
            file = self.directory.logs / f"flight/rank{self.rank}" if self._margin else None
            self.board.post("collectives", flight.dump(file))  # the others wait for the stacks
            self.board.post("stacks", {**states, self.rank: stacks()})
            if not agreed:
                first = self._others_word() or first
            if first.told_by == self.rank and not first.traceback:
                stack = self._stack_of(first)
                first = replace(first, traceback=stack, collectives=self._collectives())
            self._tell(first)
            self.board.close()
            for member in (self._members[r] for r in beside):
                if member.lives():  # frozen, and torchrun would wait for it for 30 s more
                    os.kill(member.pid, signal.SIGKILL)
        finally:
            self.leave(1)

    # In either.

    def _begin_end(self) -> bool:
        """Whether the caller is the first to end this rank for a failure, and so tells of it."""
        if not self._ending.acquire(blocking=False):
            return False
        self.enter("end")
        return True

    def _tell(self, first: Failure, error: BaseException | None = None) -> None:
        """Tell of the failure: who posted it on the console and in failure.json, rank 0 in the
        run's status and history; each its torchrun. `error` is what unwinds the main thread."""
        mine, opened = first.told_by == self.rank, self._margin is not None
        if mine:
            show(first, self.directory if opened else None)
        else:
            self._wait_for(1, "told", TOLD_S)
        if opened and (mine or self.is_main):
            # Rank 0 too, for the disk of another host may be another.
            self.directory.create_failure(asdict(first.with_log(self.directory)))
        if mine:
            self.board.post("told", True)
        if opened and self.is_main:
            self._write_end(first)
        tell_torchrun(first, error if first.rank == self.rank else None)
        if error is not None:
            process.end()  # only now do the others learn of it, where they wait for this rank
        if opened and mine and not self.is_main and self._rank_0_is_gone(first):
            self._write_end(first)

    def _write_end(self, first: Failure) -> None:
        where = "" if first.rank == self.rank else f"rank {first.rank} on {first.host}: "
        reason = where + first.exception
        self.directory.write_status("failed", self.progress.as_dict(), reason)
        self.directory.write_history("failure", first.step, rank=first.rank, reason=reason)

    def _rank_0_is_gone(self, first: Failure) -> bool:
        """Whether the run's end is left to this rank: rank 0 is dead, or gives no sign of life. Not
        where it has written, or a successor has begun."""
        owner = self._members[0]

        def is_running() -> bool:
            status = self.directory.read_status()
            found = [status.get(key) for key in ("state", "host", "pid")]
            return found == ["running", owner.host, owner.pid]

        def is_dead() -> bool:
            with contextlib.suppress(UsageError):
                self.directory.claim()  # a dead rank's claim is free
                return True
            return False

        # One of another host may live beyond a cut, and still write.
        frozen = 0 in first.silent and owner.is_beside()
        self._until(lambda: frozen or is_dead() or not is_running(), OWNER_S)
        return is_running() and (0 in first.silent or is_dead())

    def _others_word(self) -> Failure | None:
        """The failure that other ranks tell of, where this one has lost the board."""

        def read() -> Failure | None:
            with contextlib.suppress(OSError, ValueError, TypeError):
                return Failure(**json.loads(self.directory.failure.read_text(encoding="utf-8")))
            return None

        return self._until(read, OTHERS_S) if self._margin is not None else None

    def _stack_of(self, first: Failure) -> str:
        """The stack of the rank to blame, or its process's state, once all that can have told."""
        self._wait_for(len(self._members) - len(first.silent), "stacks", STACKS_S)
        with contextlib.suppress(Unreachable):
            return str(ChainMap(*self.board.read("stacks").values()).get(str(first.rank), ""))
        return ""

    def _collectives(self) -> dict[str, Any]:
        with contextlib.suppress(Unreachable):
            return {str(r): told for r, told in self.board.read("collectives").items() if told}
        return {}

    def _failure(self, rank: int, exception: str, **details: Any) -> Failure:
        """A failure of a rank, of whichever kind, that this rank tells of."""
        member = self._members[rank] if self._members else Member.here()
        details = {"step": self.progress.step, "told_by": self.rank, **details}
        return Failure(rank, member.host, member.pid, exception=exception, **details)

    def _killed(self, gone: list[int]) -> Failure:
        """That of ranks that vanished without an exception; first those that native code ended."""
        files = {r: (self.directory.stderr(r), self._members[r].pid) for r in gone}
        words = self._margin is not None and self._until(lambda: last_words(files), WORDS_S)
        rank, end, lines = words or (gone[0], "", [])
        beside, beat = self._members[rank].is_beside(), self._last_beat(rank)
        others = [r for r in gone if r != rank]
        text = f"rank {rank}" + (f" (and ranks {others})" if others else "")
        text += end or (" was killed from outside" if beside else f" {self._no_sign(rank)}")
        if beside and not end and oom_kills() > self._oom_kills:
            text += ", by the kernel for want of memory (oom_kill of its cgroup rose)"
        if beat is not None:
            text += f". It was last seen at step {beat.step} ({beat.phase})"
            text += f" with {beat.rss_gib:.2f} GiB of memory"
        if beside:
            text += f"; this host has {memory_budget().available / 2**30:.1f} GiB free now"
        # The others could not have finished a step without it.
        step = max(self.progress.step, beat.step if beat else 0)
        return self._failure(rank, text, step=step, silent=gone, traceback="\n".join(lines))

    def _hung(self, rank: int, silent: list[int]) -> Failure:
        """That of a rank for which all others wait, or seem to."""
        text, step = f"hang: nothing has moved for {self.age:.0f} s, and ", self.progress.step
        beside = [r for r, member in enumerate(self._members) if member.is_beside()]
        hosts = {member.host for r, member in enumerate(self._members) if r not in silent}
        if len({member.host for member in self._members}) > 2 and hosts == {Member.here().host}:
            # Not all of them at once.
            text += f"host {Member.here().host} gets no sign of life from any other: it is cut off"
            return self._failure(beside[0], text, silent=silent)
        phase, beat = self.phase, self._last_beat(rank)
        if beat is not None and rank != self.rank:
            # The others could not have finished a step without it.
            phase, step = beat.phase, max(beat.step, step)
        text += f"all ranks wait for rank {rank} ({phase}, {step} steps done)"
        text += f", which {self._no_sign(rank)}" if rank in silent else ""
        return self._failure(rank, text, step=step, silent=silent)

    def _no_sign(self, rank: int) -> str:
        where = f": its host {self._members[rank].host} is down, or cannot be reached"
        return "gives no sign of life" + ("" if self._members[rank].is_beside() else where)

    def _others_failure(self, watched: dict[int, Beat] | None) -> Failure | None:
        """The first failure, where one is posted by now or ranks are gone without a word; `watched`
        as for `_gone`. Raises Unreachable."""
        if (found := self.board.peek("failure")) is not None:
            return Failure(**found)
        gone = self._gone(watched)
        return self._agreed(self._killed(gone)) if gone else None

    def _gone(self, watched: dict[int, Beat] | None) -> list[int]:
        """Ranks that left without a word: on this host by their process, elsewhere by silence since
        `watched` was read, if it was. Raises Unreachable then."""
        silent: set[int] = set()
        if watched is not None:
            now = self._beats()
            silent = {r for r in range(len(self._members)) if watched.get(r) == now.get(r)}
        members = enumerate(self._members)
        return [r for r, m in members if (not m.lives() if m.is_beside() else r in silent)]

    def _beats(self) -> dict[int, Beat]:
        """What each rank last posted of itself. Raises Unreachable."""
        return {rank: Beat(**beat) for rank, beat in self.board.read("beat").items()}

    def _last_beat(self, rank: int) -> Beat | None:
        with contextlib.suppress(Unreachable):
            return self._beats().get(rank)
        return None

    def _agreed(self, failure: Failure) -> Failure:
        """The first failure of all ranks: this one, where there is none yet. Raises Unreachable."""
        return Failure(**self.board.first("failure", asdict(failure)))

    def _until(self, find: Callable[[], Any], seconds: float) -> Any:
        """Ask again and again, for at most so long, for something true."""
        deadline = self.clock.monotonic() + seconds
        while not (found := find()) and self.clock.monotonic() < deadline:
            self.clock.sleep(0.1)
        return found

    def _wait_for(self, ranks: int, name: str, seconds: float) -> None:
        """Wait until so many ranks have posted this; not where nobody can be asked."""
        with contextlib.suppress(Unreachable):
            self._until(lambda: len(self.board.read(name)) >= ranks, seconds)


def _limits(cfg: CfgNode) -> dict[str, float]:
    """Seconds that each phase of a run may take without a move."""
    start, train, save = (seconds(cfg.DIST[f"{n}_TIMEOUT"]) for n in ("INIT", "TRAIN", "SAVE"))
    # A loader worker that is stuck is told of by the loader itself, after the same timeout.
    moving = {"start": start, "data": train + 5.0, "step": train, "evaluate": train + 5.0}
    return {**moving, "save": save, "summarize": save, "end": LAST_WORDS_S}
