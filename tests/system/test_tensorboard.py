"""What TensorBoard itself shows after a kill and a resume."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.system import jobs
from tests.system.forked import Forked, launch
from tests.system.leash import Leash
from tests.system.test_checkpoints import ARGS

KILLS = (7, 19)  # shortly after a record that no checkpoint holds: it is written twice
POSITION = ("step", "epoch", "samples", "time", "nonfinite")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed twice, and finished."""
    folder = tmp_path_factory.mktemp("tensorboard")
    args = (*ARGS, "--resume", "OUTPUT_DIR", folder / "run")
    for at in KILLS:
        leash = Leash(folder, at)
        with Forked(*args, **leash.env) as job:
            leash.wait(job)
            jobs.wait_for_step(folder / "run", at - 1, job)
    launch(*args).ok()
    assert (folder / "run/metrics.rewound.jsonl").stat().st_size > 0
    return folder / "run"


@contextmanager
def tensorboard(logdir: Path, fast: str, log: Path) -> Iterator[str]:
    """The URL of a TensorBoard on this directory; it ends with the block."""
    port = jobs.free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
    command += ["--host", "127.0.0.1", "--port", str(port), f"--load_fast={fast}"]
    command += ["--reload_interval", "1", "--samples_per_plugin", "scalars=100000"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def get(url: str, **query: str) -> Any:
    """The JSON answer, or None while there is none."""
    try:
        address = f"{url}?{urllib.parse.urlencode(query)}" if query else url
        with urllib.request.urlopen(address, timeout=10) as answer:
            return json.load(answer)
    except (urllib.error.URLError, ConnectionError, TimeoutError, ValueError):
        return None


def shown(url: str, expected: set[str], timeout: float = 60) -> dict[str, list[tuple[int, Any]]]:
    """tag -> its (step, value)s, as soon as all tags are there and nothing changes any more."""
    deadline, last = time.monotonic() + timeout, None
    while time.monotonic() < deadline:
        runs = get(f"{url}/data/plugin/scalars/tags") or {}
        found: dict[str, list[tuple[int, Any]]] = {}
        for name, tags in runs.items():
            for tag in tags:
                points = get(f"{url}/data/plugin/scalars/scalars", run=name, tag=tag) or []
                found.setdefault(tag, []).extend((step, value) for _, step, value in points)
        if found and expected <= found.keys() and found == last:
            return found
        last = found
        time.sleep(0.5)
    raise AssertionError(f"TensorBoard showed {sorted(last or {})} of {sorted(expected)}")


@pytest.mark.parametrize("fast", ["true", "false"])
def test_each_step_is_shown_once(fast: str, run: Path, tmp_path: Path) -> None:
    """Invariant 2, through TensorBoard's HTTP API, with both of its loaders: each (tag, step) once,
    with the value of metrics.jsonl in single precision."""
    expected = {
        (key, record["step"]): jobs.single(value)
        for record in jobs.metrics(run)
        for key, value in record.items()
        if key not in POSITION
    }
    log = tmp_path / "tensorboard.log"
    with tensorboard(run / "tensorboard", fast, log) as url:
        try:
            found = shown(url, {tag for tag, _ in expected})
        except AssertionError as error:
            raise AssertionError(f"{error}\n{log.read_text()}") from None
    places = [(tag, step) for tag, points in found.items() for step, _ in points]
    twice = sorted({place for place in places if places.count(place) > 1})
    assert twice == []
    assert set(places) == set(expected)
    for tag, points in found.items():
        for step, value in points:
            number = float(value)  # "NaN" is a string in its JSON
            wanted = expected[tag, step]
            assert jobs.single(number) == wanted or (math.isnan(number) and math.isnan(wanted))
