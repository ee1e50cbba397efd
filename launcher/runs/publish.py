"""A run's records to a tracker, from outside the training: once each, in order, and only those that
stand."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from launcher.errors import RunError, UsageError
from launcher.runs.records import Damage, Place, objects
from launcher.runs.run import Run, printable
from launcher.runs.standing import standing_lines
from launcher.runs.status import RunStatus
from launcher.runs.tail import ended
from launcher.runs.trackers import Published, Record, Tracker, make, numbers
from launcher.telemetry.rundir import replace_json

POLL_S = 1.0
TOGETHER = 200  # records sent at once
FOLDER = "published"  # in the run directory: one small file for each place that it is sent to
# Variables whose values may stand in what a tracker's package raises.
SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True)
class Destination:
    """What the command line names."""

    to: str
    project: str = ""
    name: str = ""
    folder: Path | None = None  # of tensorboard-dir


@dataclass
class Position:
    """How far a run is sent to one place, as it is written down."""

    run: str = ""
    place: Place = field(default_factory=Place)
    sent: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    state: str = ""  # the last one that was told
    memory: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Position:
        """Raises RunError for a file that is there and is none."""
        try:
            found = orjson.loads(path.read_bytes())
            end, lines, last = found.pop("place")
            return cls(place=Place(end, lines, last.encode("latin-1")), **found)
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} cannot be read ({error!r}): how far the run is sent?") from None

    def write(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        # As text that any bytes become, and come back from.
        place = [self.place.end, self.place.lines, self.place.last.decode("latin-1")]
        replace_json(path, {**vars(self), "place": place})


def publish(run: Run, destination: Destination, follow: bool) -> str:
    """Send what stands and was not sent before; with `follow` go on until the run ends. Returns a
    line on what was done.

    Raises UsageError, or RunError where the tracker fails: nothing is lost then.
    """
    if not run.ours:
        raise UsageError(f"{run.path} is {run.kind}'s: publish sends the launcher's own runs")
    try:
        tracker = make(destination.to, destination.folder)
    except ImportError as error:
        raise UsageError(f"pip install 'launcher[trackers]' for --to {destination.to}") from error
    named = orjson.dumps([destination.to, destination.project, destination.name])
    named += str(destination.folder and destination.folder.resolve()).encode()
    file = run.path / FOLDER / f"{destination.to}-{hashlib.sha256(named).hexdigest()[:8]}.json"
    with _alone(file):
        return _Publisher(run, destination, tracker, file).send(follow)


class _Publisher:
    def __init__(self, run: Run, to: Destination, tracker: Tracker, file: Path) -> None:
        self.path, self.run, self.to, self.tracker, self.file = run.path, run, to, tracker, file
        self.position = Position.read(file)
        self.opened, self.count, self.left_out = False, 0, set[str]()
        # What is safe: of a tracker that tells only at its end, less than was given to it.
        self.at, self.sent = self.position.place, self.position.sent

    def send(self, follow: bool) -> str:
        try:
            status = self._until_the_end(follow)
        except KeyboardInterrupt:
            if not follow:
                raise
            status = self.run.status
        self._finish(status)
        state = status.state if status is not None else "no status"
        return f"{self.count} records sent to {self.to.to} ({self.sent} in all); the run: {state}"

    def _until_the_end(self, follow: bool) -> RunStatus | None:
        while True:
            # The status first: what an ended run has written last is then among what is sent.
            self.run = Run(self.path, self.run.kind, self.run.records, self.run.name)
            status = self.run.status
            self._send_all()
            if not follow or (status is not None and ended(status)):
                return status
            time.sleep(POLL_S)

    def _send_all(self) -> None:
        while lines := self._next():
            self._send(lines)

    def _next(self) -> list[bytes]:
        """The next lines, if the run is the one that was sent before, and has not gone back."""
        if self.at.end and _key(self.run) != self.position.run:
            raise RunError(
                f"{self.path} holds another run than the one that was sent before: it was started "
                f"over. To send this one, remove {self.file}, or give another --name."
            )
        if self.at.end and not self.at.stands(self.run.records):
            raise RunError(
                f"{self.path} has gone back behind what was sent (a damaged checkpoint, or a run "
                "that was complete and goes on). Nothing more is sent there; to send it all again "
                "as it is now, give another --name."
            )
        return standing_lines(self.run.directory, self.at, TOGETHER)

    def _send(self, lines: list[bytes]) -> None:
        records: list[Record] = []
        for _, found in objects(lines, orjson.loads):
            if not isinstance(found, Damage) and isinstance(found.get("step"), int):
                record, left_out = numbers(found)
                records.append(record)
                self._tell_left_out(left_out)
        with self._telling():
            if not self._open():
                return  # from the first record on
            self.tracker.send(self.sent, records)
        end = self.at.end + sum(map(len, lines))
        self.at = Place(end, self.at.lines + len(lines), lines[-1])
        self.sent, self.count = self.sent + len(records), self.count + len(records)
        if self.tracker.at_once:
            self._safe()

    def _open(self) -> bool:
        """Have the tracker ready, and told of the config; False where it begins afresh, and what
        was sent before no more counts."""
        position, stands = self.position, True
        if not self.opened:
            if position.run != (key := _key(self.run)):  # nothing is sent yet
                self.position = position = Position(key)
            stands = self.tracker.open(self._published(), position.memory, self._remember)
            stands, self.opened = stands or not self.at.end, True
            if not stands:
                print(
                    f"launcher: {self.to.to} has not kept what was sent before, or not whole: all "
                    "is sent again",
                    file=sys.stderr,
                )
                position.config, self.at, self.sent = {}, Place(), 0
                self._safe()
        if self.run.config != position.config:
            for line in self.tracker.configure(self._published()):
                print(f"launcher: {line}", file=sys.stderr)
            position.config = self.run.config
            self._remember()
        return stands

    def _published(self) -> Published:
        began = self.run.history[0]["time"]
        name = self.to.name or self.path.resolve().name
        key = hashlib.sha256(f"{self.position.run}{name}".encode()).hexdigest()[:16]
        return Published(key, name, self.to.project or "launcher", began, self.run.config)

    def _remember(self) -> None:
        self.position.write(self.file)

    def _safe(self) -> None:
        self.position.place, self.position.sent = self.at, self.sent
        self._remember()

    def _finish(self, status: RunStatus | None) -> None:
        """Have what was sent made safe, and the run's end told."""
        state = status.state if status is not None else "running"
        if not self.opened and state in ("running", self.position.state):
            return
        with self._telling():
            if not self._open():
                self._send_all()
            at = status.updated if status is not None else time.time()
            self.tracker.finish(state, status.reason if status is not None else "", at)
        self.position.state = state
        self._safe()

    def _tell_left_out(self, names: list[str]) -> None:
        for name in set(names) - self.left_out:
            self.left_out.add(name)
            told = f"{printable(name)} has more digits than {self.to.to} keeps, and is not sent"
            print(f"launcher: {told}", file=sys.stderr)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """What a tracker raises, as a message without its secrets."""
        try:
            yield
        except Exception as error:
            self.tracker.abandon()
            told = (
                str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
            )
            raise RunError(
                f"{self.to.to}: {hidden(told, os.environ)}\n{self.position.sent} records are sent, "
                "and nothing is lost: when that is mended, the same command goes on from there."
            ) from None


def hidden(text: str, environment: Mapping[str, str]) -> str:
    """A text without passwords of addresses, and the values of variables that hold secrets."""
    for name, value in environment.items():
        if SECRET.search(name) and len(value) > 3:
            text = text.replace(value, "***")
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)


def _key(run: Run) -> str:
    """What sets a run apart from any other, moved or not: the first line of its history."""
    if not run.history:
        raise RunError(f"{run.directory.history} has no line to know the run by")
    return hashlib.sha256(orjson.dumps(run.history[0])).hexdigest()


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One call at a time sends a run to a place."""
    try:
        file.parent.mkdir(exist_ok=True)
        lock = file.with_suffix(".lock").open("a")
    except OSError as error:
        raise UsageError(
            f"{file.parent} cannot be made or written ({error.strerror}): publish keeps in it how "
            "far the run is sent"
        ) from error
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another call is sending {file.parent.parent} there") from None
        yield
