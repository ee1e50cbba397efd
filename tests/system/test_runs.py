"""`launcher runs` over real runs: finished, live, damaged, and as a page in a browser."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher import cli
from tests.system import jobs
from tests.system.browser import CHROMIUM, Browser
from tests.system.leash import LEASHED_DIGITS, Leash

ARGS = ("--config-file", jobs.DIGITS, "TRAIN.DURATION", "3ep", "TASK.NAME", LEASHED_DIGITS)
CHANGED = ("CHECKPOINT.EVERY", "LOG.EVERY", "LOG.HISTOGRAMS")  # in the run that is resumed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    """A run that was killed after a checkpoint and a record, and resumed to its end, with `tail -f`
    watching. It has pictures, texts and histograms in two event files."""
    run, leash = folder / "real" / "resumed", Leash(folder, 27)
    more = ("CHECKPOINT.EVERY", "10step", "LOG.EVERY", "5step", "LOG.HISTOGRAMS", "1ep")
    args = (*ARGS, *more, "OUTPUT_DIR", run)
    with jobs.start(*args, env=leash.env) as job:
        jobs.wait_for_step(run, 25, job)
        jobs.wait_for_save(run, 20, job)
        with tailing(folder, run, "-n", "1000") as tail:
            assert tail.stdout is not None
            told = [tail.stdout.readline() for _ in range(6)]  # what is cut off is among them
            job.kill()
            # A sign of life of late: tail waits only so long for somebody to resume a dead run.
            dead = json.dumps(jobs.status(run) | {"updated": time.time() + 600})
            (run / "status.new").write_text(dead)
            (run / "status.new").replace(run / "status.json")
            jobs.train(*args, "--resume").ok()
            told += tail.stdout.readlines()
            assert tail.wait(60) == 0
    (folder / "told").write_text("".join(told))
    assert len(jobs.history(run, "resume")) == 1
    assert len(list(run.glob("tensorboard/*tfevents*"))) == 2
    return run


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    """The same with another rate, uninterrupted."""
    run = folder / "real" / "other"
    jobs.train(*ARGS, "OPTIM.LR", "0.01", "OUTPUT_DIR", run).ok()
    return run


@contextlib.contextmanager
def tailing(folder: Path, run: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`launcher runs tail -f --json`, ended in any case."""
    command = [sys.executable, "-m", "launcher", "runs", "tail", "-f", "--json", *words, str(run)]
    env = jobs.clean_environment(reading(folder))
    tail = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        yield tail
    finally:
        tail.kill()
        tail.wait()


def reading(folder: Path) -> dict[str, str]:
    """What `launcher runs` needs of an environment."""
    return {"XDG_CACHE_HOME": str(folder / "cache"), "TZ": "UTC"}


def runs(folder: Path, *words: object, code: int = 0) -> str:
    """What `launcher runs ...` prints in a pipe; asserts its exit code."""
    ended = jobs.launch("runs", *words, env=reading(folder))
    assert ended.code == code, ended.output
    return ended.out


def test_all_commands_over_real_runs(folder: Path, done: Path, other: Path) -> None:
    """They agree with each other and with the files, and change nothing in a run."""
    before = jobs.snapshot(folder / "real")
    rows = {row["run"]: row for row in json.loads(runs(folder, "list", folder / "real", "--json"))}
    assert set(rows) == {"resumed", "other"}
    for run in (done, other):
        row, best = rows[run.name], max(jobs.values(run, "val/accuracy").values())
        assert (row["state"], row["metric"], row["best"]) == ("completed", "val/accuracy", best)
        assert row["step"] == row["total"] == 69
        runs(folder, "verify", run)

    shown = runs(folder, "show", done)
    assert "checkpoint" in shown and "█" in shown
    compared = json.loads(runs(folder, "compare", done, other, "--json"))
    assert compared["config"]["OPTIM.LR"] == [0.05, 0.01]
    assert compared["config"].keys() == {"OPTIM.LR", *CHANGED}

    runs(folder, "export", done, other, "-o", folder / "x.jsonl")
    exported = [json.loads(line) for line in (folder / "x.jsonl").read_text().splitlines()]
    assert [r for r in exported if r.pop("run") == "resumed"] == jobs.metrics(done)
    assert jobs.snapshot(folder / "real") == before


def events(run: Path) -> Path:
    """The largest event file."""
    return max((run / "tensorboard").glob("*tfevents*"), key=lambda p: p.stat().st_size)


def another_metric(run: Path) -> None:
    """A checkpoint whose files are right and whose metric is not what was recorded."""
    from launcher.checkpoint.store import _digest

    file = run / "checkpoints" / "step_69" / "manifest.json"
    found = json.loads(file.read_text())
    found["metrics"]["val/accuracy"] = 0.123
    found.pop("digest")
    file.write_text(json.dumps({**found, "digest": _digest(found)}))


def another_value(run: Path) -> None:
    file = run / "metrics.jsonl"
    text = file.read_text()
    file.write_text(re.sub(r'("train/loss": ?)\d', r"\g<1>7", text, count=1))


def remove_events(run: Path) -> None:
    events(run).unlink()


def cut_events(run: Path) -> None:
    os.truncate(events(run), events(run).stat().st_size * 2 // 3)


def flip_a_bit(run: Path) -> None:
    jobs.flip_a_bit(run / "checkpoints/step_69/state.pt")


def remove_the_last_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints/step_69")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (another_value, "tensorboard: train/loss at step .* is"),
        (remove_events, "tensorboard: no train/loss.* at step"),
        (cut_events, "tensorboard: no .* at step"),
        (flip_a_bit, "checkpoints/step_69: state.pt: its sha256"),
        (another_metric, "checkpoints/step_69: val/accuracy is 0.123"),
        (remove_the_last_checkpoint, "checkpoints: none of the last step, 69"),
    ],
)
def test_verify_finds_the_damage(
    damage: Callable[[Path], object],
    told: str,
    done: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit 1 and what is wrong, of what only a real run has (tests/runs/test_verify.py damages the
    rest); and the other commands read what is left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = tmp_path / "damaged"
    shutil.copytree(done, run, symlinks=True)
    damage(run)
    assert cli.main(["runs", "verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert re.search(f"^{told}", out, re.MULTILINE), out
    for words in (["list", str(tmp_path)], ["show", str(run)], ["compare", str(done), str(run)]):
        assert cli.main(["runs", *words]) == 0


def test_tail_follows_a_run_through_a_resume(folder: Path, done: Path) -> None:
    """What it tells is what was recorded, taken back where it says so."""
    kept: list[dict[str, object]] = []
    for line in (folder / "told").read_text().splitlines():
        one = json.loads(line)
        if "rewound" in one:
            kept = [record for record in kept if record["step"] <= one["rewound"]]
        else:
            kept.append(one)
    assert kept == jobs.metrics(done)


def test_a_live_run(tmp_path: Path) -> None:
    """It is running, grows from one look to the next, is as promised, and can be followed until
    one has seen enough; when it is killed it is lost."""
    run = tmp_path / "live"
    more = ("TRAIN.DURATION", "1000000step", "EVAL.EVERY", "", "LOG.EVERY", "5step")

    def look() -> dict[str, object]:
        (row,) = json.loads(runs(tmp_path, "list", run, "--json"))
        return row

    with jobs.start(*ARGS, *more, "CHECKPOINT.EVERY", "", "OUTPUT_DIR", run) as job:
        jobs.wait_for_step(run, 5, job)
        seen = look()
        assert (seen["state"], seen["total"]) == ("running", 1_000_000)
        job.until(lambda: look()["step"] > seen["step"], "a later step")
        runs(tmp_path, "verify", run)
        with tailing(tmp_path, run, "-n", "1") as tail:
            assert tail.stdout is not None
            followed = [json.loads(tail.stdout.readline())["step"] for _ in range(20)]
            assert followed == list(range(followed[0], followed[0] + 100, 5))
            # While the run goes on: where it does not, tail ends by itself after a while.
            tail.send_signal(signal.SIGINT)
            tail.communicate(timeout=60)
            assert tail.returncode == 130
    assert json.loads(runs(tmp_path, "status", run, "--json", code=75))["state"] == "lost"
    assert look()["state"] == "lost"


# A person who smooths, zooms, and goes back.
ACTS = """
(() => {
    const svg = charts[0].svg, box = svg.getBoundingClientRect(), before = svg.innerHTML;
    const at = (kind, share) => svg.dispatchEvent(new PointerEvent(kind,
        {bubbles: true, clientX: box.left + share * box.width, clientY: box.top + 50}));
    byId("smooth").value = 0.9; byId("smooth").dispatchEvent(new Event("input"));
    const smooth = svg.innerHTML;
    at("pointerdown", .3); at("pointermove", .7); at("pointerup", .7);
    const zoomed = charts[0].zoom;
    svg.dispatchEvent(new MouseEvent("dblclick"));
    return {smoothed: smooth !== before && smooth.includes('class="raw"'),
        zoomed, tip: charts[0].tip.textContent, back: svg.innerHTML === smooth};
})()
"""
# figure -> run -> points of its curve
DRAWN = """
Object.fromEntries([...document.querySelectorAll("figure")].map(figure => [
    figure.querySelector("figcaption").textContent,
    Object.fromEntries([...figure.querySelectorAll('.curve[d^="M"][d*="L"]')].map(
        curve => [curve.dataset.run, Number(curve.dataset.points)]))]))
"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium or Chrome here")
def test_the_report_in_a_browser(folder: Path, done: Path, other: Path, tmp_path: Path) -> None:
    """Every metric is a figure with a curve a run, of as many points as it has records; zooming
    and smoothing draw it anew."""
    page = tmp_path / "report.html"
    runs(folder, "report", done, other, "-o", page)
    records = {"resumed": jobs.metrics(done), "other": jobs.metrics(other)}
    keys = {key for record in records["other"] for key in jobs.measured(record)}
    assert {"val/accuracy", "train/loss", "perf/step_s"} <= keys
    with Browser() as browser:
        browser.go(page.as_uri())
        browser.wait_for("OPTIM.LR", "checkpoint", "versions: launcher")
        assert browser.run(DRAWN) == {
            key: {name: sum(key in r for r in rows) for name, rows in records.items()}
            for key in keys
        }
        found = browser.run(ACTS)
    assert found["smoothed"] and found["back"] and "resumed" in found["tip"]
    low, high = found["zoomed"]
    assert 23 < low < high < 69
