"""The run directory: its names, and its small files written by rank 0. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from launcher.errors import UsageError
from launcher.log import get_logger
from launcher.runtime.member import Member
from launcher.telemetry.sinks import AppendFile, lines

logger = get_logger(__name__)
# Fields of a record in metrics.jsonl that are no metrics.
POSITION = ("step", "epoch", "samples", "time")
BEAT_S = 10.0  # between signs of life in status.json
# On a file system without locks: an owner on another host that has not written for so long is dead.
STALE_S = 120.0


class RunDirectory:
    """Paths of a run directory, and how its small files are written."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.status = self.path / "status.json"
        self.metrics = self.path / "metrics.jsonl"
        self.history = self.path / "history.jsonl"
        self.failure = self.path / "failure.json"
        self.logs = self.path / "logs"
        self.tensorboard = self.path / "tensorboard"
        self.rewound = self.path / "metrics.rewound.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.evaluations = self.path / "evaluations"
        self.stop = self.path / "STOP"
        self.lock = self.path / ".lock"
        self._claim: TextIO | None = None  # the open lock
        self._status: dict[str, Any] = {}
        self._writing = threading.RLock()
        self._failed: set[str] = set()

    def __reduce__(self) -> tuple[type[RunDirectory], tuple[Path]]:
        # Sent to another process it is the same directory, without this one's claim and locks.
        return RunDirectory, (self.path,)

    def log(self, rank: int) -> Path:
        """The log file of a rank."""
        return self.logs / f"rank{rank}.log"

    def stderr(self, rank: int) -> Path:
        """What a rank has written on stderr, native code included, while it lives."""
        return self.logs / f"rank{rank}.stderr"

    def holds_run(self) -> bool:
        """Whether a run has begun here; an empty directory, or one with other files, holds none."""
        return any(p.exists() for p in (self.config, self.status, self.metrics, self.checkpoints))

    def begun_by(self, job_id: str) -> bool:
        """Whether the run here was begun, or gone on with, by this same job."""
        return job_id != "" and read_json(self.environment).get("job") == job_id

    # Whose it is.

    def claim(self, wait_s: float = 0.0) -> None:
        """Become the one live job of this directory, for as long as this process lives.

        The claim is a lock of the kernel's, so that of a dead owner is gone with it. Raises
        UsageError, naming host and pid, where another job still holds it after `wait_s` seconds.
        """
        if self._claim is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.lock.open("a+", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"OUTPUT_DIR {self.path} cannot be made: {error.strerror}") from error
        deadline = time.monotonic() + wait_s
        while not self._lock(file):
            if time.monotonic() >= deadline:
                file.close()
                owner = self._owner()
                # The name may still be that of an owner before it.
                named = owner is not None and (owner.lives() or not owner.is_beside())
                who = f"host {owner.host}, pid {owner.pid}" if owner and named else "just starting"
                raise UsageError(
                    f"{self.path} is in use by another job ({who}). Wait for it, or stop it first."
                )
            time.sleep(0.2)
        self._claim = file

    def _lock(self, file: TextIO) -> bool:
        try:
            # A POSIX lock: unlike flock's, loader workers forked from here do not share it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
        # On a file system without locks the owner's own word has to do.
        owner = self._owner()
        if owner is not None and owner.is_beside():
            return not owner.lives()
        return time.time() - self.read_status().get("updated", 0) > STALE_S

    def _owner(self) -> Member | None:
        with contextlib.suppress(TypeError):
            return Member(**read_json(self.lock))
        return None

    def begin(self) -> None:
        """Claim the directory for an attempt that really starts, with this process's name; requests
        to stop, and a failure, that were those of an attempt before are so no more."""
        self.claim()
        assert self._claim is not None
        self._claim.truncate(0)
        json.dump(asdict(Member.here()), self._claim)
        self._claim.flush()
        self.stop.unlink(missing_ok=True)
        if self.failure.exists():
            self.failure.rename(_unused(self.path, "failure-", ".json"))

    def release(self) -> None:
        """Give the claim up; a process that ends does so by itself."""
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def set_aside(self) -> Path:
        """Rename the directory to DIR.old-<UTC time>, and return that. The claim ends."""
        self.release()
        return self.path.rename(_unused(self.path.parent, f"{self.path.name}.old-"))

    # The files that grow with the records.

    def positions(self) -> dict[str, int]:
        """Their lengths in bytes, for `rewind`."""
        files = [self.metrics, *self.tensorboard.glob("*tfevents*")]
        return {str(p.relative_to(self.path)): p.stat().st_size for p in files if p.exists()}

    def rewind(self, positions: Mapping[str, int], step: int, damaged: Mapping[int, str]) -> None:
        """Cut the records back to where a checkpoint was made; what is cut off is kept aside.

        The steps after the checkpoint are done, and recorded, once more.
        """
        cut = _cut(self.metrics, positions.get("metrics.jsonl", 0), self.rewound)
        for path in sorted(self.tensorboard.glob("*tfevents*")):
            # Under a name, and in a folder, that TensorBoard does not take for a run's events.
            aside = self.path / "tensorboard.rewound" / path.name.replace("tfevents", "rewound")
            cut += _cut(path, positions.get(str(path.relative_to(self.path)), 0), aside)
        if cut or damaged:
            told = {f"step_{number}": why for number, why in damaged.items()}
            self.write_history("rewind", step, bytes=cut, **({"damaged": told} if told else {}))

    # The small files.

    def read_status(self) -> dict[str, Any]:
        """status.json, or {} where there is none that can be read."""
        return read_json(self.status)

    def write_status(self, state: str, position: Mapping[str, int], reason: str = "") -> None:
        """Replace status.json: state, step, epoch, reason, host, pid, updated.

        Where that fails (a full disk, say) it is told once, and the run goes on.
        """
        here = Member.here()
        with self._writing:  # the heartbeat, which must not undo this, comes from a thread
            self._status = {"state": state, "step": position["step"], "epoch": position["epoch"]}
            self._status |= {"reason": reason, "host": here.host, "pid": here.pid}
            self._status["updated"] = time.time()
            self._try(self.status, lambda: replace_json(self.status, self._status))

    def heartbeat(self, position: Mapping[str, int]) -> None:
        """Say in status.json that a running run is alive, every BEAT_S however often called."""
        with self._writing:
            running = self._status.get("state") == "running"
            if running and time.time() - self._status["updated"] >= BEAT_S:
                self.write_status("running", position)

    def create_failure(self, failure: Mapping[str, Any]) -> bool:
        """Write failure.json, unless there is one of this attempt; whether there was none. Where it
        cannot be written, which is told, there was none either."""
        text = _dumps(failure)
        temporary = self.path / f".failure.json.{Member.here().host}.{os.getpid()}"
        try:
            temporary.write_text(text, encoding="utf-8")
            try:
                os.link(temporary, self.failure)
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links
                with self.failure.open("x", encoding="utf-8") as file:
                    file.write(text)
            finally:
                temporary.unlink()
        except FileExistsError:
            return False
        except OSError as error:
            logger.warning("%s could not be written: %s", self.failure, error)
        return True

    def write_evaluation(self, result: Mapping[str, Any]) -> None:
        """Write evaluations/<UTC time>.json."""
        self.evaluations.mkdir(parents=True, exist_ok=True)
        replace_json(_unused(self.evaluations, "", ".json"), result)

    def write_history(self, event: str, step: int, **details: Any) -> bool:
        """Append one record of what happened to history.jsonl; a failure to is told once. False
        then."""
        record = {"event": event, "step": step, "time": time.time(), **details}

        def write() -> None:
            with contextlib.closing(AppendFile(self.history)) as file:
                file.append(lines([record], default=str))

        with self._writing:  # threads write here too, and a failed line is cut off again
            return self._try(self.history, write)

    def _try(self, path: Path, write: Callable[[], None]) -> bool:
        try:
            write()
        except OSError as error:
            if path.name not in self._failed:
                self._failed.add(path.name)
                logger.warning("%s could not be written: %s", path, error)
            return False
        return True


def _unused(folder: Path, before: str, after: str = "") -> Path:
    """A path with the UTC time in its name: 20260102T030405Z, -2, -3, ... in the same second."""
    name = f"{before}{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    found, count = folder / f"{name}{after}", 1
    while found.exists():
        count += 1
        found = folder / f"{name}-{count}{after}"
    return found


def _cut(path: Path, length: int, aside: Path) -> int:
    """Cut a file to `length` bytes and append the rest to `aside`; returns how much that was."""
    if not path.exists() or path.stat().st_size <= length:
        return 0
    with path.open("r+b") as file:
        file.seek(length)
        tail = file.read()
        aside.parent.mkdir(exist_ok=True)
        with aside.open("ab") as kept:
            kept.write(tail)
            kept.flush()
            os.fsync(kept.fileno())
        file.truncate(length)
    if length == 0:
        path.unlink()
    return len(tail)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or {} where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _dumps(value: Any) -> str:
    return json.dumps(value, indent=2, default=str) + "\n"


def replace_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(_dumps(value), encoding="utf-8")
    temporary.replace(path)
