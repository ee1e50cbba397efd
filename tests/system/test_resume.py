"""A killed run, and every way to start again on its directory, in the order of a real day."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.jobs import (
    DIGITS,
    TASKS,
    Ended,
    checkpoint_steps,
    history,
    metrics,
    snapshot,
    start,
    state,
    status,
    train,
    values,
    without_torch,
)

# One epoch, so that a sample that is loaded again would be seen to be.
BATCH, STEPS, EVERY = 8, 60, 10


def settings(run: Path) -> list[Any]:
    return [
        *("OUTPUT_DIR", run, "TASK.NAME", f"{TASKS}:Noted", "TASK.TRAIN_SAMPLES", BATCH * STEPS),
        *("TRAIN.BATCH_SIZE", BATCH, "TRAIN.DURATION", "1ep", "CHECKPOINT.EVERY", f"{EVERY}step"),
        *("DATALOADER.NUM_WORKERS", 0, "LOG.EVERY", "1step", "OPTIM.LR", 0.01),
    ]


def notes_of(folder: Path, name: str) -> list[list[Any]]:
    """What each of two ranks noted."""
    return [
        [json.loads(line) for line in (folder / f"{name}.rank{rank}").read_text().splitlines()]
        for rank in range(2)
    ]


def batches(folder: Path) -> list[set[int]]:
    """The samples of each global batch of an attempt, in order."""
    ranks = [[note for note in rank if note != "step"] for rank in notes_of(folder, "samples")]
    return [set(a + b) for a, b in zip(*ranks, strict=False)]


class Killed:
    """Two ranks, killed with their torchrun some steps after a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.run, self.first, self.second = (folder / n for n in ("run", "first", "second"))
        self.first.mkdir()
        self.second.mkdir()
        env = {"LAUNCHER_TEST_NOTES": str(self.first), "LAUNCHER_TEST_SLEEP": "0.05"}
        job = start(*settings(self.run), ranks=2, env=env)
        try:
            deadline = time.monotonic() + 120
            while self.recorded() < 2 * EVERY + 3:
                assert job.process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            job.kill()
        self.step = max(checkpoint_steps(self.run))
        self.left = snapshot(self.run)
        self.records = metrics(self.run)

    def recorded(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    return Killed(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def resumed(killed: Killed) -> Ended:
    env = {"LAUNCHER_TEST_NOTES": str(killed.second)}
    return train(*settings(killed.run), "--resume", ranks=2, env=env).ok()


def test_a_killed_run_leaves_whole_files(killed: Killed) -> None:
    """A checkpoint exists completely or not at all; status still says running."""
    assert killed.step >= 2 * EVERY and killed.step % EVERY == 0
    assert state(killed.run, killed.step)["progress"]["step"] == killed.step
    assert status(killed.run)["state"] == "running"
    assert killed.step < STEPS


@pytest.mark.parametrize("ranks", [None, 2], ids=["one process", "2 ranks"])
def test_a_second_start_is_refused(killed: Killed, tmp_path: Path, ranks: int | None) -> None:
    """Contract, section 1: exit 2 before torch is imported, nothing touched, and what to do."""
    before = snapshot(killed.run)
    if ranks is None:
        env = without_torch(tmp_path / "poison")
        ended = train("--config-file", DIGITS, "OUTPUT_DIR", killed.run, env=env)
        assert ended.code == 2
        assert "Traceback" not in ended.output
        assert not (tmp_path / "poison/imported").exists()
    else:
        ended = train("--config-file", DIGITS, "OUTPUT_DIR", killed.run, ranks=ranks, timeout=60)
        assert ended.code == 1  # torchrun's own
    assert ended.output.count("already holds a run") == 1
    assert "--resume" in ended.err and "--overwrite" in ended.err
    assert str(killed.run) in ended.err
    assert snapshot(killed.run) == before


def test_a_mistake_with_resume_touches_nothing(killed: Killed) -> None:
    """A config mistake is found before the old run is opened."""
    before = snapshot(killed.run)
    words = ["--config-file", DIGITS, "OUTPUT_DIR", killed.run, "OPTIM.LRR", 1]
    for option in ("--resume", "--overwrite"):
        assert train(*words, option).code == 2
        assert snapshot(killed.run) == before


def test_resume_goes_on_at_the_checkpoint(killed: Killed, resumed: Ended) -> None:
    """Item 8: history tells the step, the run ends where it would have, the order goes on."""
    events = [(e["event"], e["step"]) for e in history(killed.run)]
    assert events[0] == ("start", 0)
    assert events.count(("resume", killed.step)) == 1
    assert [name for name, _ in events].count("start") == 1
    assert events[-1] == ("finish", STEPS)
    end = status(killed.run)
    assert (end["state"], end["step"], end["epoch"]) == ("completed", STEPS, 1)
    assert metrics(killed.run)[-1]["samples"] == BATCH * STEPS
    assert state(killed.run)["progress"] == {"step": STEPS, "epoch": 1, "samples": BATCH * STEPS}


def test_resume_repeats_and_leaves_out_no_sample(killed: Killed, resumed: Ended) -> None:
    """Invariant 3: the epoch is every sample once over both attempts, and the steps that are
    redone have the same samples as before."""
    first, second = batches(killed.first), batches(killed.second)
    assert len(second) == STEPS - killed.step
    redone = first[killed.step :]
    assert redone and second[: len(redone)] == redone
    epoch = first[: killed.step] + second
    assert sum(map(len, epoch)) == BATCH * STEPS
    assert set().union(*epoch) == set(range(BATCH * STEPS))


def test_resume_loads_no_sample_of_the_steps_before(killed: Killed, resumed: Ended) -> None:
    """Invariant 3: resuming seeks."""
    loaded = [index for rank in notes_of(killed.second, "loaded-train") for index in rank]
    done = set().union(*batches(killed.first)[: killed.step])
    assert len(done) == BATCH * killed.step
    assert not done & set(loaded)
    assert sorted(loaded) == sorted(set(range(BATCH * STEPS)) - done)


def test_resume_goes_on_with_the_same_numbers(killed: Killed, resumed: Ended) -> None:
    """The steps that are redone give the same losses: weights, optimiser and order are back."""
    before = {r["step"]: r["train/loss"] for r in killed.records if "train/loss" in r}
    redone = [step for step in before if step > killed.step]
    after: dict[int, float] = values(killed.run, "train/loss")
    assert redone
    assert {step: after[step] for step in redone} == {step: before[step] for step in redone}
    assert sorted(after) == list(range(1, STEPS + 1))


def test_each_record_once_after_a_kill(killed: Killed, resumed: Ended) -> None:
    """Invariant 2: after a crash each (key, step) stands once in metrics.jsonl."""
    steps = [record["step"] for record in metrics(killed.run) if "train/loss" in record]
    assert steps == list(range(1, STEPS + 1))


@pytest.fixture
def completed(killed: Killed, resumed: Ended) -> Iterator[Path]:
    assert status(killed.run)["state"] == "completed"
    yield killed.run


def test_resume_of_a_completed_run_changes_nothing(completed: Path) -> None:
    """Contract, section 1: it says so and exits 0; also on another number of ranks."""
    before = snapshot(completed)
    ended = train(*settings(completed), "--resume").ok()
    assert "complete" in ended.output
    assert snapshot(completed) == before


def test_overwrite_sets_the_old_run_aside(completed: Path) -> None:
    """Contract, section 1: the old directory is renamed to DIR.old-<UTC time>, whole."""
    before = {name: facts for name, facts in snapshot(completed).items() if name != "."}
    words = ["LOG.TENSORBOARD", False, "TRAIN.DURATION", "3step"]
    train(*settings(completed), *words, "--overwrite").ok()
    (old,) = completed.parent.glob(f"{completed.name}.old-*")
    stamp = old.name.removeprefix(f"{completed.name}.old-")
    assert time.strptime(stamp, "%Y%m%dT%H%M%SZ")
    assert {name: facts for name, facts in snapshot(old).items() if name != "."} == before
    assert status(completed)["step"] == 3
    assert history(completed)[0]["event"] == "start"
    assert checkpoint_steps(completed) == [3]
    assert not (completed / "tensorboard").exists()


def test_resume_without_a_run_starts_one(tmp_path: Path) -> None:
    """Contract, section 1: no run yet: start."""
    run = tmp_path / "new"
    train("--resume", *settings(run), "TRAIN.DURATION", "2step").ok()
    assert [e["event"] for e in history(run)] == ["start", "checkpoint", "finish"]
    assert status(run)["step"] == 2


def test_resume_of_a_run_without_a_checkpoint_starts_over(tmp_path: Path) -> None:
    """Contract, section 1: no checkpoint yet: start over, partial records set aside."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("SEED: 0\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "epoch": 0, "samp')
    train("--resume", *settings(run), "TRAIN.DURATION", "2step").ok()
    (old,) = tmp_path.glob("run.old-*")
    assert (old / "metrics.jsonl").read_text().endswith('"samp')
    assert status(run)["state"] == "completed"
    assert metrics(run)[0]["step"] == 1


def test_a_run_killed_after_its_last_checkpoint_is_completed_by_a_resume(tmp_path: Path) -> None:
    """It could not say so itself; a resume has nothing else to do."""
    run = tmp_path / "run"
    train(*settings(run), "TRAIN.DURATION", "2step").ok()
    (run / "status.json").write_text(json.dumps(status(run) | {"state": "running"}))
    text = (run / "history.jsonl").read_text().splitlines(keepends=True)
    (run / "history.jsonl").write_text("".join(text[:-1]))
    train("--resume", *settings(run), "TRAIN.DURATION", "2step").ok()
    assert status(run)["state"] == "completed"
    assert [e["event"] for e in history(run)] == ["start", "checkpoint", "finish"]
