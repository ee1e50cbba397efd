"""The run directory: its names, and its small files written by rank 0. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from launcher.errors import UsageError
from launcher.runtime.member import Member
from launcher.telemetry.append import append_line

logger = logging.getLogger(__name__)
LOCK = ".lock"
# Fields of a record in metrics.jsonl that are no metrics.
POSITION = ("step", "epoch", "samples", "time")
# On a file system without locks: an owner on another host that has not written for so long is dead.
# Every heartbeat takes a tenth of it.
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
        self._lock: TextIO | None = None
        self._status: dict[str, Any] = {}
        self._writing = threading.Lock()
        self._failed: set[str] = set()
        self._appending = threading.Lock()

    def __reduce__(self) -> tuple[type[RunDirectory], tuple[Path]]:
        # Sent to another process it is the same directory, without this one's claim and locks.
        return RunDirectory, (self.path,)

    def log(self, rank: int) -> Path:
        """The log file of a rank."""
        return self.logs / f"rank{rank}.log"

    def holds_run(self) -> bool:
        """Whether a run has begun here; an empty directory, or one with other files, holds none."""
        return any(p.exists() for p in (self.config, self.status, self.metrics, self.checkpoints))

    def check_writable(self) -> None:
        """Raise UsageError where the directory could not be made or written; touches nothing."""
        try:
            # exists() itself fails for a name that is too long, or in a closed folder.
            existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
            if not existing.is_dir():
                raise UsageError(f"OUTPUT_DIR {self.path}: {existing} is a file; choose another.")
            # Trying is the only test that holds for root, read-only mounts and full quotas alike.
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            raise UsageError(
                f"OUTPUT_DIR {self.path} cannot be written: {error.strerror}. Choose another with "
                "OUTPUT_DIR DIR."
            ) from error

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Replace environment.json."""
        replace_json(self.environment, environment)

    def begun_by(self, job_id: str) -> bool:
        """Whether the run here was begun, or gone on with, by this same job."""
        return job_id != "" and _read_json(self.environment).get("job") == job_id

    def set_aside(self) -> Path:
        """Rename the directory to DIR.old-<UTC time>, and return that. The claim ends."""
        self.release()
        target = unused(self.path.with_name(f"{self.path.name}.old-{utc_now()}"))
        self.path.rename(target)
        return target

    def claim(self, wait_s: float = 0.0) -> None:
        """Become the one live job of this directory, for as long as this process lives.

        The claim is a lock of the kernel's, so that of a dead owner is gone with it. Raises
        UsageError, naming host and pid, where another job still holds it after `wait_s` seconds.
        """
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"OUTPUT_DIR {self.path} cannot be made: {error.strerror}") from error
        deadline = time.monotonic() + wait_s
        while True:
            try:
                # A POSIX lock: unlike flock's, loader workers forked from here do not share it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                # On a file system without locks the owner's own word has to do.
                refused = error.errno in (errno.EACCES, errno.EAGAIN)
                if not refused and self._owner_seems_dead():
                    break
                if time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                owner = _read_json(self.path / LOCK)
                file.close()
                # The name may still be that of an owner before it.
                alive = owner.get("host") != socket.gethostname() or _is_alive(owner)
                told = f"host {owner.get('host')}, pid {owner.get('pid')}"
                raise UsageError(
                    f"{self.path} is in use by another job: "
                    f"{told if owner and alive else 'one that is just starting'}. "
                    "Wait for it, or stop it first."
                ) from None
        self._lock = file

    def sign(self) -> None:
        """Write this process's name on its claim, when the run really starts; a failure.json of an
        attempt before goes."""
        assert self._lock is not None
        self._lock.truncate(0)
        json.dump(asdict(Member.here()), self._lock)
        self._lock.flush()
        self.failure.unlink(missing_ok=True)

    def release(self) -> None:
        """Give the claim up; a process that ends does so by itself."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _owner_seems_dead(self) -> bool:
        owner = _read_json(self.path / LOCK)
        if owner.get("host") == socket.gethostname():
            return not _is_alive(owner)
        return time.time() - self.read_status().get("updated", 0) > STALE_S

    def positions(self) -> dict[str, int]:
        """Lengths in bytes of the files that grow with the records, for `rewind`."""
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

    def saved(self, manifest: Mapping[str, Any], seconds: float, error: Exception | None) -> None:
        """Tell of a checkpoint that was committed, or could not be."""
        step, name = manifest["step"], f"step_{manifest['step']}"
        if error is None:
            logger.info("checkpoint %s (%.2f s)", name, seconds)
            self.write_history("checkpoint", step, path=name, seconds=seconds)
            return
        reason = f"{type(error).__name__}: {error}"
        logger.warning(
            "checkpoint %s could not be saved: %s. Training goes on; the next save is tried when "
            "it is due.",
            name,
            reason,
        )
        self.write_history("checkpoint", step, path=name, failed=reason)

    def read_status(self) -> dict[str, Any]:
        """status.json, or {} where there is none that can be read."""
        return _read_json(self.status)

    def write_status(self, state: str, position: Mapping[str, int], reason: str = "") -> None:
        """Replace status.json: state, step, epoch, reason, host, pid, updated.

        Where that fails (a full disk, say) it is told once, and the run goes on.
        """
        status = {
            "state": state,
            "step": position["step"],
            "epoch": position["epoch"],
            "reason": reason,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "updated": time.time(),
        }
        with self._writing:  # the heartbeat's thread writes too
            self._status = status
            self._try("status.json", lambda: replace_json(self.status, status))

    def heartbeat(self, position: Mapping[str, int]) -> None:
        """Say in status.json that a running run is alive."""
        with self._writing:
            if self._status.get("state") == "running":
                at = {"step": position["step"], "epoch": position["epoch"], "updated": time.time()}
                self._status = {**self._status, **at}
                self._try("status.json", lambda: replace_json(self.status, self._status))

    def create_failure(self, failure: Mapping[str, Any]) -> bool:
        """Write failure.json unless there is one, so that the word of the first rank to come
        stands; whether it is this one's."""
        text = json.dumps(failure, indent=2, default=str) + "\n"
        temporary = self.path / f".failure.json.{socket.gethostname()}.{os.getpid()}"
        try:
            temporary.write_text(text, encoding="utf-8")
            try:
                os.link(temporary, self.failure)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                with self.failure.open("x", encoding="utf-8") as file:
                    file.write(text)
            finally:
                temporary.unlink()
        except FileExistsError:
            return False
        except OSError as error:
            logger.warning("%s could not be written: %s", self.failure, error)
            return False
        return True

    def write_evaluation(self, result: Mapping[str, Any]) -> None:
        """Write evaluations/<UTC time>.json."""
        self.evaluations.mkdir(parents=True, exist_ok=True)
        replace_json(unused(self.evaluations / f"{utc_now()}.json"), result)

    def write_history(self, event: str, step: int, **details: Any) -> bool:
        """Append one record of what happened to history.jsonl; a failure to is told once. False
        then."""
        line = _strict_dumps({"event": event, "step": step, "time": time.time(), **details})
        with self._appending:  # threads write here too, and a failed line is cut off again
            return self._try("history.jsonl", lambda: append_line(self.history, line))

    def _try(self, name: str, write: Callable[[], None]) -> bool:
        try:
            write()
        except OSError as error:
            if name not in self._failed:
                self._failed.add(name)
                logger.warning("%s could not be written: %s", self.path / name, error)
            return False
        return True


def utc_now() -> str:
    """The time as it stands in file names: 20260102T030405Z."""
    return datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")


def unused(path: Path) -> Path:
    """The path, or with -2, -3, ... before its suffix where it is taken, as by the same second."""
    found, count = path, 1
    while found.exists():
        count += 1
        suffix = ".json" if path.suffix == ".json" else ""
        found = path.with_name(f"{path.name.removesuffix(suffix)}-{count}{suffix}")
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


def _is_alive(owner: Mapping[str, Any]) -> bool:
    # By when it began as well: a container that takes another's place has its name and its pids.
    return Member(owner.get("host", ""), owner.get("pid", 0), owner.get("created", 0.0)).lives()


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or {} where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _strict_dumps(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, default=str)


def replace_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)
