"""Run directories made by hand, for what needs no training."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

START = 1_700_000_000.0
GONE = 2**22 + 1  # the id of no process: Linux gives none so great


def record(step: int, **values: float | None) -> dict[str, Any]:
    """A record at a step; train__loss=1.0 is the key train/loss."""
    named = {key.replace("__", "/"): value for key, value in values.items()}
    position = {"step": step, "epoch": step // 50, "samples": 64 * step, "time": START + step}
    bad = [key for key, value in named.items() if value is None]
    return {**position, **named, **({"nonfinite": bad} if bad else {})}


def training(steps: int) -> list[dict[str, Any]]:
    """Records of a run that gets better: training ones, and an evaluation every 50 steps."""
    found = []
    for step in range(10, steps + 1, 10):
        found.append(record(step, train__loss=100 / step, train__lr=0.1))
        if step % 50 == 0:
            found.append(record(step, val__loss=200 / step, val__accuracy=1 - 10 / step))
    return found


def event(name: str, step: int, after: float = 0.0, **more: Any) -> dict[str, Any]:
    """A line of history.jsonl, so many seconds after the start."""
    return {"event": name, "step": step, "time": START + after, **more}


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(one) + "\n" for one in records)


def append(file: Path, text: str) -> None:
    with file.open("a") as opened:
        opened.write(text)


def make_run(
    path: Path,
    records: list[dict[str, Any]] | None = None,
    state: str = "completed",
    config: Mapping[str, Any] | None = None,
    **status: Any,
) -> Path:
    """A run directory without checkpoints and events, as it stands after its end."""
    records = training(100) if records is None else records
    path.mkdir(parents=True)
    step = max((one["step"] for one in records), default=0)
    (path / "metrics.jsonl").write_text(lines(records))
    given = {"TRAIN.DURATION": f"{max(step, 1)}step", "LOG.EVERY": "10step", "EVAL.EVERY": "50step"}
    given |= {"CHECKPOINT.METRIC": "val/accuracy", "CHECKPOINT.MODE": "max", "OPTIM.LR": 0.1}
    tree: dict[str, Any] = {}
    for key, value in {**given, **(config or {})}.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    (path / "config.yaml").write_text(json.dumps(tree))  # JSON is YAML
    end = {"completed": "finish", "failed": "failure", "stopped": "stop"}.get(state)
    events = [event("start", 0, world_size=1), *([event(end, step, step)] if end else [])]
    (path / "history.jsonl").write_text(lines(events))
    now = {"state": state, "step": step, "epoch": step // 50, "reason": "", "pid": os.getpid()}
    now |= {"host": socket.gethostname(), "updated": START + step}
    (path / "status.json").write_text(json.dumps(now | status))
    environment = {"command": ["python", "train.py"], "versions": {"python": "3.11.7"}}
    (path / "environment.json").write_text(json.dumps(environment))
    return path
