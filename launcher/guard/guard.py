"""Whether the work goes on: what a rank watches beside its work, in a thread of its own, and how a
run ends that cannot go on.

Every rank posts what it is at on a board beside the process group (guard/board.py). What ends the
run is one `Failure`: the first that is posted. Who posted it tells of it, on the console and in
failure.json; rank 0 says so in the run's status and history. Where the board does not answer, a
rank leaves the word to those for whom it does, and speaks where nobody else has.

The thread waits for no collective, and for no file or lock of the loop's until it ends the process.
Where even this thread cannot run, because native code holds Python's lock (the GIL), faulthandler's
timer, which needs no lock, writes the stacks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import IO, Any, Protocol

import psutil

from launcher.config import CfgNode, parse_duration
from launcher.errors import Ended, RunError, UsageError
from launcher.guard import stop
from launcher.guard.board import Board, Unreachable
from launcher.guard.failure import Failure, describe, lost_connection, show, tell_torchrun
from launcher.guard.hang import ALONE, Beat, judge, main_stack, process_state, stacks
from launcher.guard.members import compare, introduce
from launcher.runtime import process
from launcher.runtime.member import Member
from launcher.runtime.memory import memory_budget, oom_kills
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology
from launcher.telemetry.rundir import RunDirectory

logger = logging.getLogger(__name__)
TICK_S, BEAT_S = 0.5, 1.0
# A rank that posts nothing for so long gives no sign of life.
SILENT_S = 3.0
# Before a run's ranks know each other, joining raises after the same time, with better words.
GRACE_S = 10.0
# How much later than this thread would have noticed faulthandler's timer goes off.
TIMER_S = 1.5
# For how long ranks that end wait for each other's stacks, and for the one that tells.
STACKS_S, TOLD_S = 4.0, 6.0
# For how long a rank that has no board waits for the word of others: these judge, collect the
# stacks and write.
OTHERS_S = SILENT_S + STACKS_S + TOLD_S
# How long rank 0 may give no sign of life, on the board or in status.json, before another rank
# speaks for it; and how long it may take in all.
OWNER_SILENT_S, OWNER_S = 12.0, 25.0
# How long an ending rank may take for its last words.
LAST_WORDS_S = 30.0


class Clock(Protocol):
    """Where the time comes from: by default the module `time`."""

    def monotonic(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


class Guard:
    """Watches over one attempt; the same on every rank. Alone ends a rank.

    As a context it takes the signals over and runs the thread. `join` makes the ranks known to each
    other; from then on a failure of one is told once for all. `open` says that the run directory is
    this attempt's; before, nothing in it is touched. At the context's end an error is told of,
    torchrun too, the process group is taken down, and what was told is raised as Ended. What the
    user must mend (a UsageError that is no RunError, or any before the ranks have met) is raised as
    it is.
    """

    def __init__(
        self,
        cfg: CfgNode,
        topology: Topology,
        directory: RunDirectory,
        progress: Progress,
        clock: Clock = time,
        leave: Callable[[int], None] = stop.leave,
    ) -> None:
        """`clock` and `leave`, which ends the process, are for tests."""
        self.cfg, self.topology, self.directory, self.progress = cfg, topology, directory, progress
        self.rank, self.is_main = topology.rank, topology.is_main
        self.clock, self.leave = clock, leave
        self.limits = _limits(cfg)
        self.stop: str | None = None  # why this rank was asked to stop
        self.phase = "start"
        self.age = 0.0  # seconds since something moved
        now = clock.monotonic()
        self._deadlines = {what: now + left for what, left in stop.deadlines(cfg).items()}
        self._oom_kills = oom_kills()
        self._parent = os.getppid()
        self._moves = self._seen_moves = 0
        self._ticked = now
        self._beat: Beat | None = None  # the last one posted, and when
        self._beat_at = now
        self._reading: tuple[float, dict[int, Beat]] | None = None  # the first of two in a hang
        self._signalled_at: float | None = None
        self._ending = threading.Lock()
        self._troubled = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)
        self._signals: stop.Signals | None = None  # within the context
        # By `join`.
        self._runtime: Runtime | None = None
        self._board: Board | None = None  # where there is a process group
        self._members: list[Member] = []
        # By `open`.
        self._margin: stop.StopMargin | None = None
        self._samples = 0
        self._timer_file: IO[Any] | None = None

    # In the main thread.

    def __enter__(self) -> Guard:
        self._signals = stop.Signals()
        self._thread.start()
        return self

    def join(self, task_class: type) -> Runtime:
        """Set the process up, join the process group, and meet the other ranks. A collective.

        Raises UsageError where ranks have another config, other versions or other code, RunError
        where they do not come.
        """
        self._runtime = runtime = process.start(self.topology, self.cfg)
        if runtime.store is not None:
            self._board = Board(runtime.store, self.rank, runtime.world_size)
        self._members = introduce(self.cfg, task_class, runtime)
        return runtime

    def agree(self, found: Mapping[str, Any]) -> None:
        """Raise UsageError, naming ranks, where they have found different things. A collective."""
        assert self._runtime is not None
        compare(found, self._runtime)

    def open(self) -> None:
        """The directory is this attempt's from now on."""
        assert self._runtime is not None
        by, cuda = self.topology.launched_by, self._runtime.device.type == "cuda"
        granted_s = stop.shutdown_timeout(os.environ) if by == "torchrun" else None
        self._timer_file = self.directory.log(self.rank).open("a")
        self._samples = self.progress.samples
        self._margin = stop.StopMargin(self.progress, cuda, granted_s, self.clock.monotonic)

    def enter(self, phase: str) -> None:
        """Say what comes next: "start", "data", "step", "evaluate", "summarize", "save" or "end";
        this is progress. Cheap enough for every step, and never raises."""
        # At once: the others must know of a rank that freezes whether it was in such a phase.
        tell_now = phase != self.phase and (phase in ALONE or self.phase in ALONE)
        self.phase = phase
        self._moves += 1
        if tell_now and self._signals is not None:
            self._signals.wake()

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
            self._margin.saved(seconds)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.enter("end")
                process.end()
                return
            if not self._begin_end():
                self.clock.sleep(LAST_WORDS_S)  # the thread is telling of a hang, and leaves
            told = self._failed(error)
            # Only now do the others learn of it, where they wait for this rank.
            process.end()
            if told is not None and self._stands_in(told):
                self._write_end(told)
        finally:
            self._close()
        if told is not None:
            raise Ended(getattr(error, "exit_code", 1)) from None

    def _failed(self, error: BaseException) -> Failure | None:
        """Tell of this rank's error, or of that of another rank behind it, and return that; None
        where the error is for its caller to show."""
        exception = describe(error, self.cfg, self.topology.world_size)
        trace = "" if isinstance(error, UsageError) else "".join(traceback.format_exception(error))
        mine = self._failure(self.rank, exception, trace)
        # The others wait for nobody's stack here.
        self._post("stacks", {})
        if isinstance(error, UsageError) and not (isinstance(error, RunError) and self._members):
            # It may be at this rank alone. Then rank 0 tells of it, for torchrun ends this one
            # before the command has spoken.
            self._post("told", True)
            if self._board is not None:
                with contextlib.suppress(Unreachable):
                    self._agreed(replace(mine, told_by=0))
            return None
        logger.critical("this rank failed", exc_info=error, extra={"file_only": True})
        first = self._first(mine, lost_connection(error))
        self._tell(first)
        tell_torchrun(first, error if first.rank == self.rank else None)
        return first

    def _first(self, mine: Failure, lost: bool) -> Failure:
        """The first failure of all ranks."""
        if self._board is None or not self._members:
            return mine
        try:
            if not lost:
                return self._agreed(mine)
            # A rank that fails says so before its connections go. One that was killed does not:
            # its process is gone, or its host gives no sign of life.
            deadline = self.clock.monotonic() + SILENT_S + 2 * BEAT_S
            watched = self._beats()
            while (now := self.clock.monotonic()) < deadline:
                if (found := self._board.seen("failure")) is not None:
                    return Failure(**found)
                if gone := self._gone(watched if now > deadline - BEAT_S else None):
                    return self._agreed(self._killed(gone))
                self.clock.sleep(0.2)
            return self._agreed(mine)
        except Unreachable:
            gone = self._gone(None)
            if not gone and lost and not self._members[0].is_beside():
                gone = [0]  # the store went with its host
            return self._others_word() or (self._killed(gone) if gone else mine)

    def _close(self) -> None:
        assert self._signals is not None
        self._closed.set()
        self._signals.wake()
        if self._board is not None:
            self._board.close()
        self._thread.join(2 * TICK_S)
        faulthandler.cancel_dump_traceback_later()
        if self._timer_file is not None:
            self._timer_file.close()
        self._signals.close()

    # In the guard's own thread.

    def _run(self) -> None:
        while not self._closed.is_set():
            self._surviving(self._take_signals)
            self.tick()

    def _take_signals(self) -> None:
        assert self._signals is not None
        for number in self._signals.wait(TICK_S):
            self._signalled(number)

    def tick(self) -> None:
        """Look around; the thread does so every TICK_S seconds."""
        now = self.clock.monotonic()
        # A process that was frozen (SIGSTOP, a suspended machine) has not watched meanwhile.
        elapsed, self._ticked = min(now - self._ticked, 2 * TICK_S), now
        self.age = self.age + elapsed if self._moves == self._seen_moves else 0.0
        self._seen_moves = self._moves
        for look in (self._post_beat, self._look_at_deadlines, self._look_at_others, self._look):
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
            self._closed.wait(TICK_S)  # `wait` may have been what failed

    def _signalled(self, number: int) -> None:
        now, name = self.clock.monotonic(), stop.signal.Signals(number).name
        if self._signalled_at is not None:
            if now - self._signalled_at > stop.SAME_REQUEST_S:
                stop.say(f"{name} again: leaving at once")
                self.leave(1)
            return
        self._signalled_at = now
        if self.topology.launched_by == "torchrun":
            # The kernel tells of a parent's death when its first thread is gone, a moment before
            # the parent is another.
            self.clock.sleep(0.2)
        if os.getppid() != self._parent:
            name = f"{self.topology.launched_by} died"
        have_met = self.topology.distributed and self._runtime is not None
        if self._margin is None and not have_met:
            # Nothing is made yet, and no other rank waits for this one.
            stop.say(f"{name}: stopped before the first step")
            self.leave(stop.STOPPED)
        self.request_stop(name)

    @property
    def started(self) -> bool:
        """Whether this attempt's first step is done."""
        return self._margin is not None and self.progress.samples > self._samples

    @property
    def limit(self) -> float:
        """Seconds that the phase at hand may take without a move."""
        first = self.phase in ("data", "step") and not self.started
        return self.limits["start" if first else self.phase]

    def _post_beat(self) -> None:
        now, last = self.clock.monotonic(), self._beat
        changed = last is None or (
            {last.phase, self.phase} & set(ALONE) and last.phase != self.phase
        )
        if self._runtime is None or not (changed or now - self._beat_at >= BEAT_S):
            return
        rss = 0
        with contextlib.suppress(OSError, psutil.Error):  # no descriptor left
            rss = psutil.Process().memory_info().rss
        self._beat_at = now
        self._beat = Beat(
            number=last.number + 1 if last else 0,
            collectives=self._runtime.collectives(),
            phase=self.phase,
            step=self.progress.step,
            age=self.age,
            limit=self.limit,
            rss_gib=rss / 2**30,
        )
        self._post("beat", asdict(self._beat))

    def _look_at_deadlines(self) -> None:
        if self.is_main and self._margin is not None:
            for what, deadline in self._deadlines.items():
                if self.clock.monotonic() + self._margin() >= deadline:
                    self.request_stop(what)

    def _look_at_others(self) -> None:
        """End with a rank that has failed, where the main thread is stuck in a collective (NCCL
        does not tell of a peer's end). Else it has the first word, to close what is open."""
        if self._board is None or not self._members or self.phase == "end":
            return
        found = self._board.peek("failure")
        if self.age <= SILENT_S or self.phase in ALONE:
            return
        if found is not None:
            self._end(Failure(**found))
        elif self.stop is not None and (gone := self._gone(None)):
            # What looked like a stop request is torchrun ending those that a killed rank left over.
            with contextlib.suppress(Unreachable):
                self._end(self._agreed(self._killed(gone)))

    def _look(self) -> None:
        """Whether something has moved lately enough; else find out why not, and end the run."""
        if self.age <= self.limit:
            self._reading = None
            if self._timer_file is not None and self.phase != "end":
                # Armed again each tick (53 microseconds). It ends nothing: a process that was
                # frozen by its scheduler finds its time over when it wakes.
                left = self.limits["step" if self.started else "start"] + TIMER_S
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
        if self._board is None:
            return self._end(self._hung(self.rank))
        try:
            now = self.clock.monotonic()
            if self._reading is None:
                self._reading = now, self._beats()
            elif now - self._reading[0] >= SILENT_S:
                before, after = self._reading[1], self._beats()
                self._reading = None
                verdict = judge(before, after, len(self._members), self.age, self.limit)
                if verdict is not None:
                    self._end(self._agreed(self._hung(*verdict)))
        except Unreachable:
            # The store lies on rank 0's host, or is rank 0's own.
            away = (r for r, member in enumerate(self._members) if not member.is_beside())
            blamed = 0 if self.rank else next(away, 0)
            hung = self._hung(blamed, [] if blamed == self.rank else [blamed])
            self._end(hung, agreed=False)

    def _end(self, first: Failure, agreed: bool = True) -> None:
        """Say what is known, and leave; `agreed`: the failure stands on the board.

        No rank leaves before all that can have told where they stand: a rank's end would unwind
        the main threads of the others, and torchrun would end them.
        """
        if not self._begin_end():
            return
        try:
            # Not through logging, whose lock the main thread may hold.
            words = f"{first.exception}\nthe stacks of this rank's threads:\n{stacks()}\n"
            with contextlib.suppress(OSError):
                if self._margin is not None:
                    with self.directory.log(self.rank).open("a") as log:
                        log.write(words)
                else:
                    os.write(2, words.encode())
            silent = [self._members[r] for r in first.silent if r != self.rank]
            beside = [member for member in silent if member.is_beside()]
            states = {self._members.index(member): process_state(member.pid) for member in beside}
            self._post("stacks", {self.rank: main_stack(), **states})
            if not agreed:
                first = self._others_word() or first
            if first.told_by == self.rank and not first.traceback:
                first = replace(first, traceback=self._stack_of(first))
            self._tell(first)
            if self._stands_in(first):
                self._write_end(first)
            if self._board is not None:
                self._board.flush()
            for member in beside:
                # torchrun would wait for a frozen rank for 30 s more.
                if member.lives():
                    os.kill(member.pid, stop.signal.SIGKILL)
            tell_torchrun(first)
        finally:
            self.leave(1)

    # In either.

    def _begin_end(self) -> bool:
        """Whether the caller is the first to end this rank for a failure, and so tells of it."""
        first = self._ending.acquire(blocking=False)
        if first:
            self.enter("end")
        return first

    def _failure(
        self,
        rank: int,
        exception: str,
        trace: str = "",
        step: int | None = None,
        silent: Sequence[int] = (),
    ) -> Failure:
        """A failure of a rank that this one tells of, of whichever kind."""
        member = self._members[rank] if self._members else Member.here()
        return Failure(
            rank=rank,
            host=member.host,
            pid=member.pid,
            step=self.progress.step if step is None else step,
            exception=exception,
            traceback=trace,
            told_by=self.rank,
            silent=list(silent),
        )

    def _killed(self, gone: list[int]) -> Failure:
        """That of ranks that vanished without an exception."""
        rank, member = gone[0], self._members[gone[0]]
        others = f" (and ranks {gone[1:]})" if len(gone) > 1 else ""
        text = f"rank {rank}{others} was killed from outside"
        if not member.is_beside():
            text = f"rank {rank}{others} gives no sign of life: its host {member.host} "
            text += "is down, or cannot be reached"
        elif oom_kills() > self._oom_kills:
            text += ", by the kernel for want of memory (oom_kill of its cgroup rose)"
        if beat := self._last_beat(rank):
            text += f". It was last seen at step {beat.step} ({beat.phase})"
            text += f" with {beat.rss_gib:.2f} GiB of memory"
        if member.is_beside():
            text += f"; this host has {memory_budget().available / 2**30:.1f} GiB free now"
        return self._failure(rank, text, step=beat.step if beat else None, silent=gone)

    def _hung(self, rank: int, silent: Sequence[int] = ()) -> Failure:
        """That of a rank for which all others wait, or seem to."""
        member, beat = self._members[rank], self._last_beat(rank)
        text = f"hang: nothing has moved for {self.age:.0f} s, and "
        away = {r for r, member in enumerate(self._members) if not member.is_beside()}
        if len({self._members[r].host for r in away}) > 1 and away <= set(silent):
            # Not all of them at once.
            here = min(set(range(len(self._members))) - away)
            host = self._members[here].host
            text += f"host {host} gets no sign of life from any other: it is cut off"
            return self._failure(here, text, silent=silent)
        # The others could not have finished a step without it.
        step = max(beat.step if beat else 0, self.progress.step)
        phase = self.phase if rank == self.rank or beat is None else beat.phase
        text += f"all ranks wait for rank {rank} ({phase}, {step} steps done)"
        if rank in silent:
            text += ", which gives no sign of life"
            if not member.is_beside():
                text += f": its host {member.host} is down, or cannot be reached"
        return self._failure(rank, text, step=step, silent=silent)

    def _tell(self, first: Failure) -> None:
        """Tell of the failure on the console and in failure.json, where that is this rank's to do;
        on rank 0 also in the run's status and history."""
        mine, opened = first.told_by == self.rank, self._margin is not None
        if mine:
            show(first, self.directory if opened else None)
        else:
            self._wait_for(1, "told", TOLD_S)
        if opened and (mine or self.is_main):
            # Rank 0 too, for the disk of another host may be another.
            self.directory.create_failure(asdict(first.with_log(self.directory)))
        if mine:
            self._post("told", True)
        if opened and self.is_main:
            self._write_end(first)

    def _stands_in(self, first: Failure) -> bool:
        """Whether rank 0 is gone, so that this rank, which told of the failure, writes the run's
        end: its claim is free, or it is silent. Not where it has written, or a successor has."""
        if self.is_main or first.told_by != self.rank or self._margin is None:
            return False
        owner, began = self._members[0], self.clock.monotonic()
        # A silent rank of another host may live beyond a cut, and still write.
        patience = 0.0 if 0 in first.silent and owner.is_beside() else OWNER_SILENT_S
        sign, signed_at = None, began
        while True:
            status, now = self.directory.read_status(), self.clock.monotonic()
            runs = status.get("state") == "running" and status.get("pid") == owner.pid
            if not runs or status.get("host") != owner.host or now - began > OWNER_S:
                return False
            found = status.get("updated"), self._last_beat(0)
            sign, signed_at = (sign, signed_at) if found == sign else (found, now)
            if now - signed_at >= patience:
                return True
            with contextlib.suppress(UsageError):
                self.directory.claim()
                patience = 0.0  # its claim was free: look again, then write
            self.clock.sleep(0.2)

    def _write_end(self, first: Failure) -> None:
        reason = first.exception
        if first.rank != self.rank:
            reason = f"rank {first.rank} on {first.host}: {reason}"
        self.directory.write_status("failed", self.progress.as_dict(), reason)
        self.directory.write_history("failure", first.step, rank=first.rank, reason=reason)

    def _others_word(self) -> Failure | None:
        """The failure that other ranks tell of, where this one has lost the board."""
        deadline = self.clock.monotonic() + OTHERS_S
        while self._margin is not None and self.clock.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError, TypeError):
                return Failure(**json.loads(self.directory.failure.read_text(encoding="utf-8")))
            self.clock.sleep(0.2)
        return None

    def _stack_of(self, first: Failure) -> str:
        """The stack of the rank to blame, or its process's state where it cannot tell; waits for
        all that can tell theirs."""
        if self._board is None:
            return main_stack()
        self._wait_for(len(self._members) - len(first.silent), "stacks", STACKS_S)
        with contextlib.suppress(Unreachable):
            for told in self._board.read("stacks").values():
                if (found := told.get(str(first.rank))) is not None:
                    return str(found)
        return ""

    def _gone(self, watched: dict[int, Beat] | None) -> list[int]:
        """Ranks that left without a word: on this host by their process, elsewhere by silence since
        `watched` was read, if it was."""
        now = {}
        with contextlib.suppress(Unreachable):
            now = self._beats() if watched is not None else {}
        return [
            rank
            for rank, member in enumerate(self._members)
            if not member.lives()
            and (member.is_beside() or (watched is not None and watched.get(rank) == now.get(rank)))
        ]

    def _beats(self) -> dict[int, Beat]:
        """What each rank last posted of itself. Raises Unreachable."""
        assert self._board is not None
        return {rank: Beat(**beat) for rank, beat in self._board.read("beat").items()}

    def _last_beat(self, rank: int) -> Beat | None:
        if self._board is not None:
            with contextlib.suppress(Unreachable):
                return self._beats().get(rank)
        return None

    def _agreed(self, failure: Failure) -> Failure:
        """The first failure of all ranks: this one, where there is none yet. Raises Unreachable."""
        assert self._board is not None
        return Failure(**self._board.first("failure", asdict(failure)))

    def _post(self, name: str, value: Any) -> None:
        if self._board is not None:
            self._board.post(name, value)

    def _wait_for(self, ranks: int, name: str, seconds: float) -> None:
        """Wait until so many ranks have posted something, for at most so long; not at all where
        nobody can be asked."""
        deadline = self.clock.monotonic() + seconds
        with contextlib.suppress(Unreachable):
            while self._board is not None and len(self._board.read(name)) < ranks:
                if self.clock.monotonic() > deadline:
                    return
                self.clock.sleep(0.1)


def _limits(cfg: CfgNode) -> dict[str, float]:
    """Seconds that each phase of a run may take without a move."""
    start, train, save = (
        parse_duration(text).amount  # type: ignore[union-attr]  # the config check demands them
        for text in (cfg.DIST.INIT_TIMEOUT, cfg.DIST.TRAIN_TIMEOUT, cfg.DIST.SAVE_TIMEOUT)
    )
    # A loader worker that is stuck is told of by the loader itself, after the same timeout.
    data = train + 5.0
    return {
        **{"start": start, "data": data, "step": train, "evaluate": data},
        **{"save": save, "summarize": save, "end": LAST_WORDS_S},
    }
