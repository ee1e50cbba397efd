"""`launcher runs samples` against what the data set really was asked for, and what it does not
know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.data.plan import ENDLESS
from launcher.errors import UsageError
from launcher.runs.run import open_run
from launcher.runs.samples import samples
from tests.runs.made import append, event, lines, make_run, record
from tests.system import jobs

ARGS = (
    "DATALOADER.NUM_WORKERS",
    "0",
    "TASK.NAME",
    "tests.system.tasks:Noted",
    "EVAL.EVERY",
    "",
    "LOG.TENSORBOARD",
    "False",
)
KEYS = ("TRAIN.BATCH_SIZE", "8", "TRAIN.MICRO_BATCH_SIZE", "3", "LOG.EVERY", "100step")


def train(notes: Path, ranks: int, *words: object) -> list[list[list[list[int]]]]:
    """A run of Noted; for each step the micro-batches that each rank was given."""
    notes.mkdir()
    env = {"LAUNCHER_TEST_NOTES": str(notes)}
    command = ["train", *ARGS, *KEYS, *words]
    with jobs.Group(command, ranks, env) if ranks > 1 else jobs.Forked(command, env) as job:
        job.wait().ok()
    by_rank = []
    for rank in range(ranks):
        steps: list[list[list[int]]] = [[]]
        for note in map(json.loads, (notes / f"samples.rank{rank}").read_text().splitlines()):
            if note == "step":
                steps.append([])
            else:
                steps[-1].append(note)
        by_rank.append(steps[:-1])
    return [list(step) for step in zip(*by_rank, strict=True)]


def told(run: Path, step: int) -> list[list[list[int]]]:
    return [one["micro_batches"] for one in samples(open_run(run), step)["ranks"]]


@pytest.mark.slow
def test_what_the_data_set_was_asked_for(tmp_path: Path) -> None:
    """Over two ranks, micro-batches, epochs with a small last batch, a resume on one rank, and one
    with another batch size in the middle of an epoch."""
    run, more = tmp_path / "run", ("--resume", "--allow", "TRAIN.DURATION,TRAIN.BATCH_SIZE")
    first = train(tmp_path / "a", 2, "OUTPUT_DIR", run, "TRAIN.DURATION", "7step")
    second = train(tmp_path / "b", 1, "OUTPUT_DIR", run, "TRAIN.DURATION", "12step", *more)
    changed = ("TRAIN.DURATION", "17step", "TRAIN.BATCH_SIZE", "6", *more)
    third = train(tmp_path / "c", 1, "OUTPUT_DIR", run, *changed)
    assert [len(steps) for steps in (first, second, third)] == [7, 5, 5]
    asked = [*first, *second, *third]
    assert [told(run, step) for step in range(1, 18)] == asked
    # A rank alone, and what stands beside it.
    one = samples(open_run(run), 5, rank=1)
    assert one["ranks"] == [{"rank": 1, "micro_batches": first[4][1]}]
    assert (one["epoch"], one["batch"], one["samples"], one["are"]) == (0, 4, 3, "indices")
    with pytest.raises(UsageError, match="was done on 2 ranks"):
        samples(open_run(run), 5, rank=2)


@pytest.mark.parametrize("sampler", ["sequential", jobs.slow("replacement")])
def test_other_orders_and_dropped_batches(sampler: str, tmp_path: Path) -> None:
    keys = ("TRAIN.SAMPLER", sampler, "TRAIN.DROP_LAST", "True", "TRAIN.DURATION", "6step")
    asked = train(tmp_path / "notes", 1, "OUTPUT_DIR", tmp_path / "run", *keys)
    assert [told(tmp_path / "run", step) for step in range(1, 7)] == asked


def made(path: Path, steps: int = 20, records: Any = None, **config: Any) -> Path:
    """A run by hand, of 35 samples in batches of 8: 5 batches an epoch."""
    keys = {key.replace("__", "."): value for key, value in config.items()}
    given = [record(steps)] if records is None else records
    run = make_run(path, given, config={"TRAIN.BATCH_SIZE": 8, **keys})
    known = {"lengths": {"train": 35}, "kinds": {"train": "map-style"}, "total_steps": 20}
    (run / "environment.json").write_text(json.dumps(known))
    return run


def refused(run: Path, step: int) -> str:
    with pytest.raises(UsageError) as error:
        samples(open_run(run), step)
    return str(error.value)


@pytest.mark.parametrize("sampler", ["weighted", "grouped", "dataset"])
def test_orders_that_need_the_data_set(sampler: str, tmp_path: Path) -> None:
    message = refused(made(tmp_path / "run", TRAIN__SAMPLER=sampler), 3)
    assert sampler in message and "launcher replay" in message


def test_steps_that_are_none(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    for step in (0, 21):
        assert "steps from 1 to 20" in refused(run, step)


def test_a_step_that_is_not_done_yet(tmp_path: Path) -> None:
    run = made(tmp_path / "run", steps=10)
    assert samples(open_run(run), 10)["notes"] == []
    assert "the run is at step 10" in samples(open_run(run), 11)["notes"][0]


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    """It recorded no lengths."""
    run = made(tmp_path / "run")
    (run / "environment.json").write_text("{}")
    assert "DATASET_LENGTH" in refused(run, 3)


def test_an_iterable_data_set(tmp_path: Path) -> None:
    """It has positions."""
    run = made(tmp_path / "run")
    known = {"lengths": {"train": ENDLESS}, "kinds": {"train": "iterable"}}
    (run / "environment.json").write_text(json.dumps(known))
    found = samples(open_run(run), 3)
    assert found["are"] == "positions" and "of which it has one" in found["notes"][0]
    assert found["ranks"][0]["micro_batches"] == [[16, 17, 18, 19, 20, 21, 22, 23]]


def skipping(*pairs: tuple[int, int]) -> list[dict[str, Any]]:
    """Records of steps, each after so many batches of 8 (of an epoch of 35 samples)."""
    return [
        {**record(step), "samples": batches // 5 * 35 + batches % 5 * 8} for step, batches in pairs
    ]


def test_steps_that_the_scaler_left_out(tmp_path: Path) -> None:
    """Told where records and a checkpoint leave one possibility, and not where they leave two."""
    records = skipping((4, 4), (8, 9), (12, 13), (16, 18))
    run = made(tmp_path / "run", records=records, TRAIN__PRECISION="fp16")
    (run / "history.jsonl").write_text(lines([event("start", 0, world_size=1)]))
    plain = made(tmp_path / "plain")
    for step, batch in {1: 1, 4: 4, 8: 9, 9: 10, 12: 13, 16: 18}.items():
        assert told(run, step) == told(plain, batch), step
    for step in (5, 7, 13, 17):
        assert "the scaler leaves steps out" in refused(run, step)
    # At a stop a record may come after batches that were left out.
    append(run / "history.jsonl", lines([event("stop", 16)]))
    assert "the scaler" in refused(run, 16)
    (run / "checkpoints/step_14").mkdir(parents=True)
    manifest = {"step": 14, "samples": 3 * 35 + 8}
    (run / "checkpoints/step_14/manifest.json").write_text(json.dumps(manifest))
    assert "the scaler" in refused(run, 13)
    manifest["samples"] -= 8
    (run / "checkpoints/step_14/manifest.json").write_text(json.dumps(manifest))
    assert told(run, 13) == told(plain, 14)


def test_the_attempt_that_did_a_step_last(tmp_path: Path) -> None:
    """A resume that went back before a step has done it once more, on its own ranks and with its
    own keys; what they were before is read from what differed."""
    run = made(tmp_path / "run", TRAIN__MICRO_BATCH_SIZE=2)
    history = [
        event("start", 0, world_size=4),
        event("resume", 10, world_size=3),
        event("resume", 6, world_size=1, differs=["TRAIN.MICRO_BATCH_SIZE: 0 -> 2"]),
    ]
    (run / "history.jsonl").write_text(lines(history))
    assert [len(told(run, step)) for step in (6, 7, 11)] == [4, 1, 1]
    assert [len(one) for one in told(run, 6)[0:1]] == [1]
    assert [len(one) for one in told(run, 7)] == [4]
    # What differed cannot be read: the value before is not known, that after it is.
    history[2]["differs"] = ["TRAIN.MICRO_BATCH_SIZE: <object> -> 2"]
    (run / "history.jsonl").write_text(lines(history))
    assert "TRAIN.MICRO_BATCH_SIZE" in refused(run, 6)
    assert told(run, 7)
    shutil.rmtree(run)
