"""Whole runs: what a task records is exact over kills, and no file slows or ends the training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.system import jobs
from tests.system.exact import COMMON, assert_same, records, scalars
from tests.system.test_exact import wait_for_step

TASK = Path(__file__).with_name("telemetry_task.py")
ARGS = [*COMMON, "TASK.NAME", f"{TASK}:Telling", "DATALOADER.NUM_WORKERS", "0"]
ARGS += ["LOG.HISTOGRAMS", "4step", "TASK.WIDTH", "64"]
# The task imports from tests.
PATH = {"PYTHONPATH": str(jobs.ROOT)}
SHOWN = ("images", "histograms", "text")


def media(run: Path) -> dict[tuple[str, str, int], list[bytes]]:
    """(plugin, tag, step) -> contents of what TensorBoard holds beside scalars and the config."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    found: dict[tuple[str, str, int], list[bytes]] = {}
    for tag in events.Tags()["tensors"]:
        kind = events.SummaryMetadata(tag).plugin_data.plugin_name
        if kind in SHOWN and tag != "config":
            for event in events.Tensors(tag):
                content = event.tensor_proto.SerializeToString(deterministic=True)
                found.setdefault((kind, tag, event.step), []).append(content)
    return found


def assert_equal_to_tensorboard(run: Path) -> None:
    expected = {
        (key, record["step"]): [jobs.single(value)]
        for record in jobs.metrics(run)
        for key, value in record.items()
        if key not in ("step", "epoch", "samples", "time", "nonfinite")
    }
    shown = {place: [v for v, _ in values] for place, values in jobs.event_scalars(run).items()}
    assert shown == expected


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that was never interrupted."""
    run = tmp_path_factory.mktemp("telemetry") / "run"
    jobs.train(*ARGS, "OUTPUT_DIR", run, env=PATH).ok()
    return run


def test_what_a_task_records(whole: Path) -> None:
    """Issue 6, items 2 and 4."""
    found = media(whole)
    steps = {(kind, tag): set[int]() for kind, tag, _ in found}
    for kind, tag, step in found:
        steps[kind, tag].add(step)
    assert steps["histograms", "train/inputs"] == {5, 10, 15, 20, 25}
    assert steps["images", "train/inputs_as_image"] == {5, 10, 15, 20, 25}
    assert steps["text", "train/note"] == {7, 14, 21, 28}
    assert steps["images", "val/split"] == {5, 10, 15, 20, 25, 28}
    for tag in ("weights/0.weight", "gradients/0.weight", "gradients/8.bias"):
        assert steps["histograms", tag] == {4, 8, 12, 16, 20, 24, 28}
    odd = jobs.values(whole, "train/odd_steps")
    assert odd[6] == 5
    assert odd[9] == pytest.approx((7 * 4 + 9 * 8) / 12)  # step 7 has an epoch's last 4 samples
    largest, mean = jobs.values(whole, "val/largest"), jobs.values(whole, "val/mean_input")
    by_hand = jobs.values(whole, "val/mean_input_by_hand")
    assert set(largest) == set(mean) == {5, 10, 15, 20, 25, 28}
    assert all(mean[step] == pytest.approx(by_hand[step], abs=1e-6) for step in mean)
    rates = [jobs.values(whole, f"train/lr{part}") for part in ("", "/0", "/head")]
    assert rates[0] == rates[1]
    assert all(rates[2][step] == pytest.approx(10 * rates[0][step]) for step in rates[0])
    eta = jobs.values(whole, "perf/eta_s")
    assert set(eta) == set(rates[0]) and eta[28] == 0 and min(eta.values()) == 0
    environment = jobs.strict_json((whole / "environment.json").read_text())
    assert environment["total_steps"] == 28
    assert len(list((whole / "tensorboard").iterdir())) == 1
    assert_equal_to_tensorboard(whole)


@pytest.mark.parametrize("ranks", [None, 3])
def test_a_killed_run_has_everything_once(ranks: int | None, whole: Path, tmp_path: Path) -> None:
    """Invariant 2 for pictures, histograms, texts and a task's own scalars."""
    args = (*ARGS, "DATALOADER.NUM_WORKERS", "1" if ranks else "0")
    reference, run = whole, tmp_path / "run"
    if ranks:
        reference = tmp_path / "reference"
        jobs.train(*args, "OUTPUT_DIR", reference, ranks=ranks, env=PATH).ok()
    for step in (6, 15):
        env = {**PATH, "LAUNCHER_TEST_SLEEP": "0.05"}
        job = jobs.start(*args, "--resume", "OUTPUT_DIR", run, ranks=ranks, env=env)
        try:
            wait_for_step(run, step, job)
            time.sleep(0.03)
        finally:
            job.kill()
    jobs.train(*args, "--resume", "OUTPUT_DIR", run, ranks=ranks, env=PATH).ok()
    assert records(run) == records(reference)
    found = media(run)
    assert all(len(contents) == 1 for contents in found.values())
    assert found == media(reference)
    assert scalars(run) == scalars(reference)
    ours, theirs = jobs.state(run)["model"], jobs.state(reference)["model"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if ranks:
        # The evaluation is that of one process to the last bit, a task's scalars included.
        first, alone = (jobs.values(r, "val/mean_input") for r in (reference, whole))
        assert first == alone


def test_a_stuck_file_stops_no_step(whole: Path, tmp_path: Path) -> None:
    """Records can be written only after the 20th step; were a step to wait for that, none would
    come so far. Once they can, all are there."""
    run = tmp_path / "run"
    args = (*ARGS, "CHECKPOINT.EVERY", "", "CHECKPOINT.KEEP_BEST", "0", "LOG.EVERY", "1step")
    env = {**PATH, "LAUNCHER_TEST_STUCK": "20"}
    jobs.train(*args, "OUTPUT_DIR", run, env=env).ok()
    assert [r["step"] for r in jobs.metrics(run) if "train/loss" in r] == [*range(1, 29)]
    assert not [r for r in jobs.history(run) if r["event"] == "sink"]
    assert_equal_to_tensorboard(run)


@pytest.mark.parametrize("name", ["tfevents", "metrics.jsonl"])
def test_a_file_that_fails_ends_nothing_and_misses_nothing(
    name: str, whole: Path, tmp_path: Path
) -> None:
    """Half of what is written fails six times: one warning, one line of history, and in the end
    every number once in both files."""
    run = tmp_path / "run"
    env = {**PATH, "LAUNCHER_TEST_FAIL": f"{name}:6"}
    ended = jobs.train(*ARGS, "OUTPUT_DIR", run, env=env).ok()
    assert ended.err.count("cannot be written: OSError") == 1
    assert "is written again" in ended.err
    (line,) = [r for r in jobs.history(run) if r["event"] == "sink"]
    assert "No space left on device" in line["failed"]
    assert_same(run, whole)
    assert media(run) == media(whole)
    assert_equal_to_tensorboard(run)


def test_warnings_of_all_ranks_are_seen_once(tmp_path: Path) -> None:
    """Issue 6, item 1."""
    run = tmp_path / "run"
    args = (*ARGS, "TRAIN.DURATION", "1ep", "OUTPUT_DIR", run)
    env = {**PATH, "LAUNCHER_TEST_WARN": "1", "PYTHONWARNINGS": "always"}
    ended = jobs.train(*args, ranks=3, env=env).ok()
    shown = [line for line in ended.err.splitlines() if "UserWarning: of" in line]
    assert sum("of all ranks" in line and "repeated" not in line for line in shown) == 1, shown
    (first,) = [x for x in shown if "of one rank" in x and "repeated" not in x]
    assert "W rank 1: " in first
    # Rank 0 counts those of all, rank 1 its own.
    counts = [line for line in shown if "(repeated " in line]
    assert sorted(("rank 1: " in line, "of one rank" in line) for line in counts) == [
        (False, False),
        (True, True),
    ]
    for rank in range(3):
        log = (run / f"logs/rank{rank}.log").read_text()
        assert "UserWarning: of all ranks" in log
        assert ("UserWarning: of one rank" in log) == (rank == 1)


def test_counting_flops_changes_nothing(whole: Path, tmp_path: Path) -> None:
    """With two ranks, whose gradients meet in the step that is counted."""
    runs: list[Any] = []
    for count in ("True", "False"):
        run = tmp_path / count
        options = ("LOG.COUNT_FLOPS", count, "LOG.PEAK_TFLOPS", "0.5", "OUTPUT_DIR", run)
        jobs.train(*ARGS, *options, ranks=2, env=PATH).ok()
        runs.append(run)
    assert_same(*runs)
    counted, plain = (jobs.values(run, "perf/flops_per_s") for run in runs)
    assert plain == {} and len(counted) == 10
    speed, share = (jobs.values(runs[0], f"perf/{key}") for key in ("samples_per_s", "mfu"))
    (per_sample,) = {round(counted[step] / speed[step]) for step in counted}
    width, last = 64, 64 // 3
    products = 32 * width + width * width + width * last + last * 2
    assert per_sample == 2 * (3 * products - 32 * width)  # the input needs no gradient
    assert all(share[step] == pytest.approx(counted[step] / 1e12) for step in counted)


def test_no_histograms_without_the_key(tmp_path: Path) -> None:
    run = tmp_path / "run"
    jobs.train(
        *ARGS, "LOG.HISTOGRAMS", "", "TRAIN.DURATION", "1ep", "OUTPUT_DIR", run, env=PATH
    ).ok()
    assert {tag for kind, tag, _ in media(run) if kind == "histograms"} == {"train/inputs"}
