"""What people see of a run in TensorBoard: through its HTTP API, and in a real browser."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG

from tests.system import jobs
from tests.system.browser import CHROMIUM, Browser
from tests.system.leash import LEASHED_DIGITS, Leash

# Where to put a screenshot for the docs, if anywhere.
SHOT = os.environ.get("LAUNCHER_TEST_SCREENSHOT", "")
ARGS = [
    *("--config-file", jobs.DIGITS, "TASK.NAME", LEASHED_DIGITS, "TRAIN.DURATION", "2ep"),
    *("LOG.EVERY", "1step", "LOG.HISTOGRAMS", "1ep", "CHECKPOINT.EVERY", "5step"),
]
KILLS = (7, 19)  # shortly after a record that no checkpoint holds: it is written twice


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with everything that it can show: killed twice, stopped, and finished."""
    folder = tmp_path_factory.mktemp("tensorboard")
    run, args = folder / "run", [*ARGS, "--resume", "OUTPUT_DIR", folder / "run"]
    for at in KILLS:
        leash = Leash(folder, at)
        with jobs.start(*args, env=leash.env) as job:
            leash.wait(job)
            jobs.wait_for_step(run, at - 1, job)
    leash = Leash(folder, 30)
    with jobs.start(*args, env=leash.env) as job:
        leash.wait(job)
        job.send(signal.SIGTERM)
        leash.to(40)
        assert job.wait(60).code == 75
    # All that was recorded before the stop is in the files, and no end of the run is.
    stopped = jobs.status(run)
    assert stopped["state"] == "stopped"
    assert max(jobs.values(run, "train/loss")) == stopped["step"]
    assert max(step for _, step in jobs.event_scalars(run)) == stopped["step"]
    assert ends(run) == 0
    jobs.train(*args).ok()
    assert ends(run) == 1
    assert (run / "metrics.rewound.jsonl").stat().st_size > 0
    return run


def ends(run: Path) -> int:
    """How often the event files say that the run succeeded."""
    paths = (run / "tensorboard").iterdir()
    events = [Event.FromString(data) for p in paths for data in RawEventFileLoader(str(p)).Load()]
    return sum(v.tag == SESSION_END_INFO_TAG for event in events for v in event.summary.value)


@contextmanager
def tensorboard(logdir: Path, fast: str) -> Iterator[str]:
    """The URL of a TensorBoard on this directory; it ends with the block."""
    port = jobs.free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir, "--port", port]
    command += ["--host", "127.0.0.1", f"--load_fast={fast}", "--reload_interval", "1"]
    with jobs.Job([*command, "--samples_per_plugin", "scalars=100000"]) as job:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            print(job.output())


@pytest.fixture(scope="module")
def url_of(run: Path) -> Iterator[Callable[[str], str]]:
    """The URL of a TensorBoard, by what its --load_fast is; each is started once."""
    with ExitStack() as stack:
        yield cache(lambda fast: stack.enter_context(tensorboard(run / "tensorboard", fast)))


Points = dict[tuple[str, int], list[tuple[float, float]]]


def get(url: str, **query: str) -> Any:
    """The JSON answer, or None while there is none."""
    try:
        with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.load(answer)
    except (OSError, ValueError):
        return None


def shown(url: str) -> Points:
    """(tag, step) -> its (value, wall time)s."""
    found: Points = {}
    for run, tags in (get(f"{url}/data/plugin/scalars/tags") or {}).items():
        for tag in tags:
            for at, step, value in (
                get(f"{url}/data/plugin/scalars/scalars", run=run, tag=tag) or []
            ):
                found.setdefault((tag, step), []).append((value, at))
    return found


@pytest.mark.parametrize("fast", ["true", "false"])
def test_each_step_is_shown_once(fast: str, url_of: Callable[[str], str], run: Path) -> None:
    """Invariant 2, with both of TensorBoard's loaders: each (tag, step) once, with the value of
    metrics.jsonl in single precision, and its time."""
    expected, found, last = jobs.expected_scalars(run), {}, None
    deadline = time.monotonic() + 60
    # Until all is there, and nothing changes any more.
    while time.monotonic() < deadline and not (expected.keys() <= found.keys() and found == last):
        time.sleep(0.5)
        found, last = shown(url_of(fast)), found
    assert found == expected


@pytest.fixture(scope="module")
def page(url_of: Callable[[str], str]) -> Iterator[tuple[Browser, str]]:
    if CHROMIUM is None:
        pytest.skip("no chromium here (apt: chromium)")
    with Browser() as browser:
        yield browser, url_of("true")


Page = tuple[Browser, str]
SCALARS = ("train/loss", "val/accuracy", "val/loss")


def last_value(run: Path, key: str) -> float:
    return list(jobs.values(run, key).values())[-1]


def test_scalars(run: Path, page: Page) -> None:
    """The groups of metrics.jsonl's keys, and cards with the last values."""
    browser, url = page
    browser.go(f"{url}/#scalars")
    browser.wait_for("perf", "system", "train", "val")
    browser.go(f"{url}/?tagFilter=train%2F(loss%7Clr)%7Cval%2F(loss%7Cacc)#timeseries")
    # The last value of each card's line, as TensorBoard rounds it.
    rounded = [f"{last_value(run, key):.4f}".rstrip("0") for key in SCALARS]
    browser.wait_for(*SCALARS, *rounded)
    if SHOT:
        browser.screenshot(Path(SHOT))


def test_the_config_and_the_tasks_text(page: Page) -> None:
    browser, url = page
    browser.go(f"{url}/#text")
    seen = browser.wait_for("tag: config", "tag: val/confusion", "digit \\ read as")
    assert "BATCH_SIZE:64" in seen and f"NAME:{LEASHED_DIGITS}" in seen


def test_hparams(run: Path, page: Page) -> None:
    """One row, that of the run itself, with its keys and metrics; no sub-run."""
    browser, url = page
    browser.go(f"{url}/#hparams")
    seen = browser.wait_for("Trial ID", "OPTIM.LR", "TASK.DROPOUT", "val/accuracy", str(run))
    assert seen.count(str(run)) == 1
    assert "OUTPUT_DIR" not in seen and "LOG.EVERY" not in seen
    # The final metrics: one in the table, another as the page gets it.
    loss = jobs.single(last_value(run, "val/loss"))
    browser.wait_for(browser.run(f"({loss!r}).toPrecision(5)"))
    (group,) = browser.run(
        """(() => {
            const asked = new XMLHttpRequest();
            asked.open("POST", "data/plugin/hparams/session_groups", false);
            asked.setRequestHeader("Content-Type", "application/json");
            asked.send(JSON.stringify({startIndex: 0, sliceSize: 10, allowedStatuses:
                ["STATUS_SUCCESS"], colParams: [{metric: {group: "", tag: "val/accuracy"}}]}));
            return JSON.parse(asked.responseText).sessionGroups;
        })()"""
    )
    (session,) = group["sessions"]
    metrics = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
    assert metrics["val/accuracy"] == jobs.single(last_value(run, "val/accuracy"))
    assert group["hparams"]["OPTIM.LR"] == 0.05
    assert session["status"] == "STATUS_SUCCESS"


def test_pictures_and_histograms(page: Page) -> None:
    browser, url = page
    browser.go(f"{url}/#images")
    browser.wait_for("val/confusion_matrix", "val/misread")
    browser.go(f"{url}/#histograms")
    browser.wait_for("gradients", "weights")
