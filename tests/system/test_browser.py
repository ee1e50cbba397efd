"""What a person sees of a run in TensorBoard, in a real browser."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG

from tests.system import jobs
from tests.system.browser import CHROMIUM, Browser
from tests.system.test_exact import wait_for_step
from tests.system.test_tensorboard import tensorboard

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt: chromium)")
# Where to put a screenshot for the docs, if anywhere.
SHOT = os.environ.get("LAUNCHER_TEST_SCREENSHOT", "")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the digits with everything that it can show, stopped once and resumed."""
    run = tmp_path_factory.mktemp("browser") / "run"
    few = ("TRAIN.DURATION", "2ep", "LOG.HISTOGRAMS", "1ep", "OUTPUT_DIR", run)
    job = jobs.start("--config-file", jobs.DIGITS, "LOG.EVERY", "1step", *few)
    try:
        wait_for_step(run, 5, job)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(60).code == 75
    finally:
        job.kill()
    # All that was recorded before the stop is in the files, and no end of the run is.
    stopped = jobs.status(run)
    assert stopped["state"] == "stopped"
    assert max(jobs.values(run, "train/loss")) == stopped["step"]
    assert max(step for _, step in jobs.event_scalars(run)) == stopped["step"]
    assert ends(run) == 0
    jobs.train("--config-file", jobs.DIGITS, "--resume", "LOG.EVERY", "1step", *few).ok()
    assert ends(run) == 1
    return run


def ends(run: Path) -> int:
    """How often the event files say that the run succeeded."""
    paths = (run / "tensorboard").iterdir()
    events = [Event.FromString(data) for p in paths for data in RawEventFileLoader(str(p)).Load()]
    return sum(v.tag == SESSION_END_INFO_TAG for event in events for v in event.summary.value)


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, str]]:
    log = tmp_path_factory.mktemp("log") / "tensorboard.log"
    with tensorboard(run / "tensorboard", "true", log) as url, Browser() as browser:
        yield browser, url


Page = tuple[Browser, str]


SCALARS = ("train/loss", "val/accuracy", "val/loss")


def test_scalars(run: Path, page: Page) -> None:
    """The groups of metrics.jsonl's keys, and cards with the last values."""
    browser, url = page
    browser.go(f"{url}/#scalars")
    browser.wait_for("perf", "system", "train", "val")
    browser.go(f"{url}/?tagFilter=train%2F(loss%7Clr)%7Cval%2F(loss%7Cacc)#timeseries")
    # The last value of each card's line, as TensorBoard rounds it.
    last = {key: list(jobs.values(run, key).values())[-1] for key in SCALARS}
    browser.wait_for(*last, *(f"{last[key]:.4f}".rstrip("0") for key in SCALARS))
    if SHOT:
        browser.screenshot(Path(SHOT))


def test_the_config_and_the_tasks_text(page: Page) -> None:
    browser, url = page
    browser.go(f"{url}/#text")
    seen = browser.wait_for("tag: config", "tag: val/confusion", "digit \\ read as")
    assert "BATCH_SIZE:64" in seen and "NAME:digits" in seen


def test_hparams(run: Path, page: Page) -> None:
    """One row, that of the run itself, with its keys and metrics; no sub-run."""
    browser, url = page
    browser.go(f"{url}/#hparams")
    seen = browser.wait_for("Trial ID", "OPTIM.LR", "TASK.DROPOUT", "val/accuracy", str(run))
    assert seen.count(str(run)) == 1
    assert "OUTPUT_DIR" not in seen and "LOG.EVERY" not in seen
    # The final metrics: one in the table, another as the page gets it.
    loss = list(jobs.values(run, "val/loss").values())[-1]
    browser.wait_for(browser.run(f"({jobs.single(loss)!r}).toPrecision(5)"))
    last = jobs.values(run, "val/accuracy")
    groups = browser.run(
        """(() => {
            const asked = new XMLHttpRequest();
            asked.open("POST", "data/plugin/hparams/session_groups", false);
            asked.setRequestHeader("Content-Type", "application/json");
            asked.send(JSON.stringify({startIndex: 0, sliceSize: 10, allowedStatuses:
                ["STATUS_SUCCESS"], colParams: [{metric: {group: "", tag: "val/accuracy"}}]}));
            return JSON.parse(asked.responseText).sessionGroups;
        })()"""
    )
    (group,) = groups
    (session,) = group["sessions"]
    metrics = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
    assert metrics["val/accuracy"] == jobs.single(last[max(last)])
    assert group["hparams"]["OPTIM.LR"] == 0.05
    assert session["status"] == "STATUS_SUCCESS"


def test_pictures_and_histograms(page: Page) -> None:
    browser, url = page
    browser.go(f"{url}/#images")
    browser.wait_for("val/confusion_matrix", "val/misread")
    browser.go(f"{url}/#histograms")
    browser.wait_for("gradients", "weights")
