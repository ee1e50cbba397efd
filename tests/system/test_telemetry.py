"""Whole runs: what a task records is exact over kills, and no file slows or ends the training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.system import jobs
from tests.system.exact import COMMON, assert_same, assert_same_weights, records, scalars
from tests.system.jobs import slow

TASK = Path(__file__).with_name("telemetry_task.py")
ARGS = [*COMMON, "TASK.NAME", f"{TASK}:Telling", "DATALOADER.NUM_WORKERS", "0"]
ARGS += ["LOG.HISTOGRAMS", "4step", "TASK.WIDTH", "64"]
SHOWN = ("images", "histograms", "tensors")


def media(run: Path) -> dict[tuple[str, str, int], list[Any]]:
    """(kind, tag, step) -> contents of what TensorBoard holds beside scalars and the config."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance=dict.fromkeys(SHOWN, 0))
    events.Reload()
    contents: dict[str, Callable[[Any], Any]] = {
        "images": lambda event: event.encoded_image_string,
        "histograms": lambda event: event.histogram_value,
        "tensors": lambda event: event.tensor_proto.string_val[:],
    }
    found: dict[tuple[str, str, int], list[Any]] = {}
    for kind in SHOWN:
        for tag in events.Tags()[kind]:
            if not tag.startswith(("config", "_hparams_")):
                for event in getattr(events, kind.title())(tag):
                    content = contents[kind](event)
                    found.setdefault((kind, tag, event.step), []).append(content)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that was never interrupted."""
    run = tmp_path_factory.mktemp("telemetry") / "run"
    jobs.train(*ARGS, "OUTPUT_DIR", run).ok()
    return run


def test_what_a_task_records(whole: Path) -> None:
    """Issue 6, items 2 and 4."""
    found = media(whole)
    steps = {(kind, tag): set[int]() for kind, tag, _ in found}
    for kind, tag, step in found:
        steps[kind, tag].add(step)
    assert steps["histograms", "train/inputs"] == {5, 10, 15, 20, 25}
    assert steps["images", "train/inputs_as_image"] == {5, 10, 15, 20, 25}
    assert steps["tensors", "train/note"] == {7, 14, 21, 28}
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
    assert jobs.environment(whole)["total_steps"] == 28
    assert len(list((whole / "tensorboard").iterdir())) == 1
    assert jobs.event_scalars(whole) == jobs.expected_scalars(whole)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two ranks, with loader workers."""
    run = tmp_path_factory.mktemp("telemetry") / "two"
    jobs.train(*ARGS, "DATALOADER.NUM_WORKERS", "1", "OUTPUT_DIR", run, ranks=2).ok()
    return run


@pytest.mark.parametrize(("ranks", "kills"), [(None, (13,)), slow(2, (6, 15))])
def test_a_killed_run_has_everything_once(
    ranks: int | None, kills: tuple[int, ...], whole: Path, tmp_path: Path, request: Any
) -> None:
    """Invariant 2 for pictures, histograms, texts and a task's own scalars."""
    args = (*ARGS, "DATALOADER.NUM_WORKERS", "1" if ranks else "0")
    reference, run = request.getfixturevalue("two") if ranks else whole, tmp_path / "run"
    for step in kills:
        env = {"LAUNCHER_TEST_SLEEP": "0.05"}
        with jobs.start(*args, "--resume", "OUTPUT_DIR", run, ranks=ranks, env=env) as job:
            jobs.wait_for_step(run, step, job)
            time.sleep(0.03)
    jobs.train(*args, "--resume", "OUTPUT_DIR", run, ranks=ranks).ok()
    assert records(run) == records(reference)
    found = media(run)
    assert all(len(contents) == 1 for contents in found.values())
    assert found == media(reference)
    assert scalars(run) == scalars(reference)
    assert_same_weights(run, reference)
    if ranks:
        # The evaluation is that of one process to the last bit, a task's scalars included.
        first, alone = (jobs.values(r, "val/mean_input") for r in (reference, whole))
        assert first == alone


def test_a_stuck_file_stops_no_step(tmp_path: Path) -> None:
    """Records can be written only after the 20th step; were a step to wait for that, none would
    come so far. Once they can, all are there."""
    run = tmp_path / "run"
    args = (*ARGS, "CHECKPOINT.EVERY", "", "CHECKPOINT.KEEP_BEST", "0", "LOG.EVERY", "1step")
    env = {"LAUNCHER_TEST_STUCK": "20"}
    jobs.train(*args, "OUTPUT_DIR", run, env=env).ok()
    assert [r["step"] for r in jobs.metrics(run) if "train/loss" in r] == [*range(1, 29)]
    assert not [r for r in jobs.history(run) if "failed" in r]
    assert jobs.event_scalars(run) == jobs.expected_scalars(run)


def test_a_slow_file_and_one_that_fails_end_nothing_and_miss_nothing(
    whole: Path, tmp_path: Path
) -> None:
    """One takes 50 ms a write, and half of what is written to the other fails three times, which is
    told of once, on the console and in the history. In the end every number stands once in both.
    How little the steps notice is in benchmarks/recording.py."""
    run = tmp_path / "run"
    env = {"LAUNCHER_TEST_SLOW": "metrics.jsonl:0.05", "LAUNCHER_TEST_FAIL": "tfevents:3"}
    env |= {"LAUNCHER_TEST_SLEEP": "0.1"}
    ended = jobs.train(*ARGS, "LOG.EVERY", "1step", "OUTPUT_DIR", run, env=env).ok()
    failed, again = "event file cannot be written: OSError", "event file is written again"
    assert (ended.err.count(failed), ended.err.count(again)) == (1, 1), ended.err
    told = jobs.history(run, "sink")
    assert {r["sink"] for r in told} == {"TensorBoard's event file"} and len(told) == 2
    assert "No space left on device" in told[0]["failed"] and told[1]["recovered"]
    assert [r["step"] for r in jobs.metrics(run) if "train/loss" in r] == [*range(1, 29)]
    assert jobs.event_scalars(run) == jobs.expected_scalars(run)
    assert media(run) == media(whole)
    assert_same_weights(run, whole)


def test_what_ranks_and_their_workers_say(tmp_path: Path) -> None:
    """Warnings of rank 0 and errors of all are on the console, all of it in each rank's own file;
    Python drops a warning's repeats, once a process."""
    run = tmp_path / "run"
    args = (*ARGS, "TRAIN.DURATION", "1ep", "DATALOADER.NUM_WORKERS", "1", "OUTPUT_DIR", run)
    ended = jobs.train(*args, ranks=2, env={"LAUNCHER_TEST_WARN": "1"}).ok()
    lines = ended.err.splitlines()
    for who, processes in {"a rank": 1, "a worker": 3}.items():  # one tries the data out
        warned, failed = f"UserWarning: warning of {who}", f"error of {who}"
        assert not [line for line in lines if warned in line and "rank 1: " in line]
        for rank in range(2):
            log = (run / f"logs/rank{rank}.log").read_text()
            shown = [line for line in lines if failed in line and ("rank 1: " in line) == rank]
            assert log.count(failed) == len(shown) >= 7
            assert 1 <= log.count(warned) <= processes
            assert rank or log.count(warned) == ended.err.count(warned)


@pytest.mark.parametrize("ranks", [None, slow(2)])
def test_counting_flops_changes_nothing(
    ranks: int | None, whole: Path, tmp_path: Path, request: Any
) -> None:
    """Also with two ranks, whose gradients meet in the step that is counted."""
    reference, run = request.getfixturevalue("two") if ranks else whole, tmp_path / "run"
    options = ("LOG.COUNT_FLOPS", "True", "LOG.PEAK_TFLOPS", "0.5", "LOG.HISTOGRAMS", "")
    jobs.train(*ARGS, *options, "OUTPUT_DIR", run, ranks=ranks).ok()
    assert_same(run, reference)
    # And without LOG.HISTOGRAMS there are the task's own ones alone.
    assert {tag for kind, tag, _ in media(run) if kind == "histograms"} == {"train/inputs"}
    assert jobs.values(reference, "perf/flops_per_s") == {}
    counted = jobs.values(run, "perf/flops_per_s")
    assert len(counted) == 10
    peak = 0.5e12 * (ranks or 1)
    speed, share = (jobs.values(run, f"perf/{key}") for key in ("samples_per_s", "mfu"))
    (per_sample,) = {round(counted[step] / speed[step]) for step in counted}
    width, last = 64, 64 // 3
    products = 32 * width + width * width + width * last + last * 2
    assert per_sample == 2 * (3 * products - 32 * width)  # the input needs no gradient
    assert all(share[step] == pytest.approx(counted[step] / peak) for step in counted)
