"""The run directory: its names, and its small files written by rank 0. Imports no torch."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jsonlines

from launcher.errors import UsageError


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
        self.checkpoints = self.path / "checkpoints"

    def holds_run(self) -> bool:
        """Whether a run has begun here; an empty directory, or one with other files, holds none."""
        return any(p.exists() for p in (self.config, self.status, self.metrics, self.checkpoints))

    def check_writable(self) -> None:
        """Raise UsageError where the directory could not be made or written; touches nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"OUTPUT_DIR {self.path} is a file; choose a directory.")
        existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not existing.is_dir():
            raise UsageError(f"OUTPUT_DIR {self.path}: {existing} is a file; choose another.")
        try:
            # Trying is the only test that holds for root, read-only mounts and full quotas alike.
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            raise UsageError(
                f"OUTPUT_DIR {self.path} cannot be written: {error.strerror} ({existing}). "
                "Choose another with OUTPUT_DIR DIR."
            ) from error

    def create(self) -> None:
        """Make the directory. Raises UsageError where that fails."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"OUTPUT_DIR {self.path} cannot be made: {error.strerror}") from error

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Replace environment.json."""
        replace_json(self.environment, environment)

    def set_aside(self) -> Path:
        """Rename the directory to DIR.old-<UTC time>, and return that."""
        stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        target = self.path.with_name(f"{self.path.name}.old-{stamp}")
        count = 1
        while target.exists():  # twice within one second
            count += 1
            target = self.path.with_name(f"{self.path.name}.old-{stamp}-{count}")
        self.path.rename(target)
        return target

    def read_status(self) -> dict[str, Any]:
        """status.json, or {} where there is none that can be read."""
        try:
            status = json.loads(self.status.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def write_status(self, state: str, position: Mapping[str, int], reason: str = "") -> None:
        """Replace status.json: state, step, epoch, reason, host, pid, updated."""
        replace_json(
            self.status,
            {
                "state": state,
                "step": position["step"],
                "epoch": position["epoch"],
                "reason": reason,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "updated": time.time(),
            },
        )

    def write_history(self, event: str, step: int, **details: Any) -> None:
        """Append one record of what happened to history.jsonl."""
        with jsonlines.open(self.history, "a", dumps=_strict_dumps) as writer:
            writer.write({"event": event, "step": step, "time": time.time(), **details})


def _strict_dumps(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, default=str)


def replace_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)
