"""A run's records as they come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import orjson

from launcher.errors import UsageError
from launcher.runs.records import Damage, Place, objects
from launcher.runs.run import Run
from launcher.runs.status import RunStatus
from launcher.runs.terminal import record_line

POLL_S = 0.5
# A lost or failed run may be about to be restarted: it has ended when it was silent for so long.
GRACE_S = 20.0
BLOCK = 1 << 16


def tail(run: Run, lines: int, follow: bool, as_json: bool = False) -> Iterator[str]:
    """The last `lines` records as lines, and with `follow` those that come, until the run ends.

    Where a resume cuts records off that is told, and their steps come once more.
    """
    if not run.ours:
        raise UsageError(f"{run.path} is {run.kind}'s: use `show`, or `export`")
    file, known = run.records, len(run.attempts)
    place, last = _end(file, lines)
    yield from _told(last, as_json)
    while follow:
        # Status and history before the records: what an ended run wrote last is then among them,
        # and a resume tells of itself before it cuts them.
        now = Run(run.path, run.kind, file, run.name)
        begun = [now.history[attempt].get("step") for attempt in now.attempts]
        status, after = now.status, -1
        if place.end and not place.stands(file):
            new = begun[known:] or begun[-1:]
            after = min((step for step in new if isinstance(step, int)), default=0)
            told = orjson.dumps({"rewound": after}).decode()
            yield told if as_json else f"--- back to step {after}"
            place = Place()
        known = len(begun)
        for line in _from(file, place):
            place = Place(place.end + len(line), 0, line)
            yield from _told([line], as_json, after)
        if status is not None and ended(status):
            if not as_json:
                reason = f" ({status.reason})" if status.reason else ""
                yield f"--- {status.state}{reason}: step {status.step}, epoch {status.epoch}"
            return
        time.sleep(POLL_S)


def ended(status: RunStatus) -> bool:
    """Whether a run has come to its end, as far as that can be known."""
    if status.state in ("lost", "failed"):
        return time.time() - status.updated > GRACE_S
    return status.state != "running"


def _end(path: Path, count: int) -> tuple[Place, list[bytes]]:
    """Where the file's last whole line ends, and the last `count` of them."""
    try:
        with path.open("rb") as file:
            end = start = file.seek(0, 2)
            data = b""
            while start and data.count(b"\n") < count + 2:
                start = max(0, end - 2 * len(data) - BLOCK)
                file.seek(start)
                data = file.read(end - start)
    except FileNotFoundError:
        return Place(), []
    whole, newline, torn = data.rpartition(b"\n")
    lines = [line + b"\n" for line in whole.split(b"\n")] if newline else []
    place = Place(end - len(torn), 0, lines[-1]) if lines else Place()
    return place, lines[len(lines) - min(count, len(lines)) :]


def _from(path: Path, place: Place) -> Iterator[bytes]:
    """Whole lines from a place on."""
    try:
        with path.open("rb") as file:
            file.seek(place.end)
            yield from (line for line in file if line.endswith(b"\n"))
    except FileNotFoundError:  # not yet made, or cut back to nothing
        return


def _told(lines: list[bytes], as_json: bool, after: int = -1) -> Iterator[str]:
    """Lines as they are printed, but for records up to a step."""
    for number, found in objects(lines, orjson.loads):
        text = lines[number - 1].decode(errors="replace").rstrip("\n")
        if isinstance(found, Damage):
            yield orjson.dumps({"damaged": text}).decode() if as_json else f"--- no record: {text}"
        elif not (isinstance(step := found.get("step"), int) and step <= after):
            yield text if as_json else record_line(found)
