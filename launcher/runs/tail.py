"""A run's records as they come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from launcher.errors import UsageError
from launcher.runs.run import Run
from launcher.runs.status import RunStatus, read_status
from launcher.runs.terminal import record_line

POLL_S = 0.5
# A lost run may be about to be restarted: it has ended only when it was silent for this long.
GRACE_S = 20.0
BLOCK = 1 << 16


def tail(run: Run, lines: int, follow: bool, as_json: bool = False) -> Iterator[str]:
    """The last `lines` records as lines, and with `follow` those that come, until the run ends.

    Where a resume cuts records off that is told, and their steps come once more.
    """
    if not run.ours:
        raise UsageError(f"{run.path} is {run.kind}'s: use `show`, or `export`")
    position, last, rewinds = 0, b"", _rewinds(run)
    found = _last_lines(run.records, lines)
    if found is not None:
        position, last, shown = found
        yield from _told(shown, as_json)
    while follow:
        # Before the records: what an ended run wrote last is then among them.
        status = _status(run)
        cut = _cut(run.records, position, last)
        if cut:
            known, rewinds = len(rewinds), _rewinds(run)
            step = min(rewinds[known:], default=0)
            yield (
                orjson.dumps({"rewound": step}).decode() if as_json else f"--- back to step {step}"
            )
            position, last = 0, b""
        for line in _complete(run.records, position):
            position, last = position + len(line), line
            if not cut or _step(line) > step:
                yield from _told([line], as_json)
        if status is not None and _ended(status):
            if not as_json:
                reason = f" ({status.reason})" if status.reason else ""
                yield f"--- {status.state}{reason}: step {status.step}, epoch {status.epoch}"
            return
        time.sleep(POLL_S)


def _ended(status: RunStatus) -> bool:
    if status.state == "lost":
        return time.time() - status.updated > GRACE_S
    return status.state != "running"


def _status(run: Run) -> RunStatus | None:
    try:
        return read_status(run.path)
    except UsageError:
        return None


def _rewinds(run: Run) -> list[int]:
    """The steps that resumes went back to."""
    run.__dict__.pop("_history", None)  # read anew
    steps = [e.get("step") for e in run.history if e.get("event") == "rewind"]
    return [step for step in steps if isinstance(step, int)]


def _last_lines(path: Path, count: int) -> tuple[int, bytes, list[bytes]] | None:
    """Where the file's last whole line ends, that line, and the last `count` of them."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        end = start = file.seek(0, 2)
        data = b""
        while start and data.count(b"\n") < count + 2:
            start = max(0, start - BLOCK)
            file.seek(start)
            data = file.read(end - start)
    whole, newline, torn = data.rpartition(b"\n")
    found = [line + b"\n" for line in whole.split(b"\n")] if newline else []
    return (
        end - len(torn),
        found[-1] if found else b"",
        found[len(found) - count :] if count else [],
    )


def _cut(path: Path, position: int, last: bytes) -> bool:
    """Whether the line that ended at a position does not stand there any more."""
    if not position:
        return False
    try:
        with path.open("rb") as file:
            file.seek(position - len(last))
            return file.read(len(last)) != last
    except FileNotFoundError:
        return True


def _complete(path: Path, position: int) -> Iterator[bytes]:
    """Whole lines from a position on."""
    if path.exists():
        with path.open("rb") as file:
            file.seek(position)
            for line in file:
                if line.endswith(b"\n"):
                    yield line


def _told(lines: list[bytes], as_json: bool) -> Iterator[str]:
    for line in lines:
        record = _record(line)
        if record is None:
            text = line.decode(errors="replace").strip()
            yield orjson.dumps({"damaged": text}).decode() if as_json else f"--- no record: {text}"
        else:
            yield line.decode().rstrip("\n") if as_json else record_line(record)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def _step(line: bytes) -> int:
    step = (_record(line) or {}).get("step")
    return step if isinstance(step, int) else 0
