"""A killed run, and every way to start again on its directory, in the order of a real day."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.system.jobs import (
    DIGITS,
    TASKS,
    checkpoint_steps,
    history,
    metrics,
    snapshot,
    start,
    state,
    status,
    train,
    unchanged,
    values,
    wait_for_save,
    wait_for_step,
    without_torch,
)
from tests.system.leash import Leash

# One epoch, so that a sample that is loaded again would be seen to be.
BATCH, STEPS, EVERY = 8, 60, 10


def settings(run: Path) -> list[Any]:
    return [
        *("OUTPUT_DIR", run, "TASK.NAME", f"{TASKS}:Noted", "TASK.TRAIN_SAMPLES", BATCH * STEPS),
        *("TRAIN.BATCH_SIZE", BATCH, "TRAIN.DURATION", "1ep", "CHECKPOINT.EVERY", f"{EVERY}step"),
        *("DATALOADER.NUM_WORKERS", 0, "LOG.EVERY", "1step", "OPTIM.LR", 0.01),
    ]


def notes_of(folder: Path, name: str) -> list[list[Any]]:
    """What each rank noted."""
    return [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob(f"{name}.rank*"))
    ]


def batches(folder: Path) -> list[set[int]]:
    """The samples of each global batch of an attempt, in order."""
    ranks = [[note for note in rank if note != "step"] for rank in notes_of(folder, "samples")]
    return [set().union(*parts) for parts in zip(*ranks, strict=False)]


class Killed:
    """Two ranks, killed with their torchrun some steps after a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.run, self.first = folder / "run", folder / "first"
        self.first.mkdir()
        leash = Leash(folder, 2 * EVERY + 4)
        env = {"LAUNCHER_TEST_NOTES": str(self.first), **leash.env}
        with start(*settings(self.run), ranks=2, env=env) as job:
            leash.wait(job)
            wait_for_save(self.run, 2 * EVERY, job)
            wait_for_step(self.run, 2 * EVERY + 3, job)
        self.step = max(checkpoint_steps(self.run))
        self.records = metrics(self.run)


class Resumed:
    """A copy of the killed run that was resumed on so many ranks; None is without torchrun."""

    def __init__(self, killed: Killed, folder: Path, ranks: int | None) -> None:
        self.run, self.notes, self.ranks = folder / "run", folder / "notes", ranks
        self.notes.mkdir()
        shutil.copytree(killed.run, self.run, symlinks=True)
        env = {"LAUNCHER_TEST_NOTES": str(self.notes)}
        train(*settings(self.run), "--resume", ranks=ranks, env=env).ok()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    return Killed(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module", params=[2, None], ids=["2 ranks", "one process"])
def resumed(
    killed: Killed, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Resumed:
    return Resumed(killed, tmp_path_factory.mktemp("resumed"), request.param)


def test_a_killed_run_leaves_whole_files(killed: Killed) -> None:
    """A checkpoint exists completely or not at all; status still says running."""
    assert killed.step >= 2 * EVERY and killed.step % EVERY == 0
    assert state(killed.run, killed.step)["progress"]["step"] == killed.step
    assert status(killed.run)["state"] == "running"
    assert killed.step < STEPS


def test_a_second_start_is_refused(killed: Killed, tmp_path: Path) -> None:
    """Contract, section 1: exit 2 before torch is imported, nothing touched, and what to do."""
    env = without_torch(tmp_path / "poison")
    with unchanged(killed.run):
        ended = train("--config-file", DIGITS, "OUTPUT_DIR", killed.run, env=env, cold=True)
    assert ended.code == 2 and "Traceback" not in ended.output
    assert not (tmp_path / "poison/imported").exists()
    assert ended.output.count("already holds a run") == 1
    assert "--resume" in ended.err and "--overwrite" in ended.err
    assert str(killed.run) in ended.err


@pytest.mark.parametrize(
    ("words", "told"),
    [([], "already holds a run"), (["OPTIM.LRR", "1"], "did you mean OPTIM.LR?")],
    ids=["directory", "config"],
)
def test_a_mistake_under_torchrun_stays_one(killed: Killed, words: list[str], told: str) -> None:
    """torchrun's next try, which implies --resume, does not go on with a run that was refused. Both
    times only rank 0 tells why."""
    args = ["--config-file", DIGITS, *words, "OUTPUT_DIR", killed.run]
    with unchanged(killed.run):
        ended = train(*args, ranks=2, options=["--max-restarts=1"], timeout=60)
    assert ended.code == 1  # torchrun's own
    assert ended.output.count(told) == 2 and ended.err.count(told) == 2


def test_a_mistake_with_resume_touches_nothing(killed: Killed) -> None:
    """A config mistake is found before the old run is opened."""
    words = ["--config-file", DIGITS, "OUTPUT_DIR", killed.run, "OPTIM.LRR", 1]
    for option in ("--resume", "--overwrite"):
        with unchanged(killed.run):
            assert train(*words, option).code == 2


def test_resume_goes_on_at_the_checkpoint(killed: Killed, resumed: Resumed) -> None:
    """Item 8: history tells the step, the run ends where it would have, the order goes on."""
    run = resumed.run
    events = [(e["event"], e["step"]) for e in history(run)]
    assert events[0] == ("start", 0) and events[-1] == ("finish", STEPS)
    assert events.count(("resume", killed.step)) == 1
    assert len(history(run, "start")) == 1
    end = status(run)
    assert (end["state"], end["step"], end["epoch"]) == ("completed", STEPS, 1)
    assert metrics(run)[-1]["samples"] == BATCH * STEPS
    assert state(run)["progress"] == {"step": STEPS, "epoch": 1, "samples": BATCH * STEPS}


def test_resume_repeats_and_leaves_out_no_sample(killed: Killed, resumed: Resumed) -> None:
    """Invariant 3: the epoch is every sample once over both attempts, and the steps that are
    redone have the same samples as before, also on another number of ranks."""
    first, second = batches(killed.first), batches(resumed.notes)
    assert len(second) == STEPS - killed.step
    redone = first[killed.step :]
    assert redone and second[: len(redone)] == redone
    epoch = first[: killed.step] + second
    assert sum(map(len, epoch)) == BATCH * STEPS
    assert set().union(*epoch) == set(range(BATCH * STEPS))


def test_resume_loads_no_sample_of_the_steps_before(killed: Killed, resumed: Resumed) -> None:
    """Invariant 3: resuming seeks."""
    loaded = [index for rank in notes_of(resumed.notes, "loaded-train") for index in rank]
    done = set().union(*batches(killed.first)[: killed.step])
    assert len(done) == BATCH * killed.step
    assert not done & set(loaded)
    assert sorted(loaded) == sorted(set(range(BATCH * STEPS)) - done)


def test_resume_goes_on_with_the_same_numbers(killed: Killed, resumed: Resumed) -> None:
    """The steps that are redone give the same losses, each once (invariant 2): weights, optimiser
    and order are back. On another number of ranks they are added up in another order."""
    before = {r["step"]: r["train/loss"] for r in killed.records if "train/loss" in r}
    redone = [step for step in before if step > killed.step]
    after: dict[int, float] = values(resumed.run, "train/loss")
    assert redone
    for step in redone:
        assert after[step] == pytest.approx(before[step], rel=0 if resumed.ranks else 1e-5, abs=0)
    steps = [record["step"] for record in metrics(resumed.run) if "train/loss" in record]
    assert steps == list(range(1, STEPS + 1))


def test_resume_of_a_completed_run_changes_nothing(resumed: Resumed) -> None:
    """Contract, section 1: it says so and exits 0; also on another number of ranks."""
    with unchanged(resumed.run):
        ended = train(*settings(resumed.run), "--resume").ok()
    assert "complete" in ended.output


def test_overwrite_sets_the_old_run_aside(resumed: Resumed) -> None:
    """Contract, section 1: the old directory is renamed to DIR.old-<UTC time>, whole."""
    run = resumed.run
    before = {**snapshot(run), ".": None}
    words = ["LOG.TENSORBOARD", False, "TRAIN.DURATION", "3step"]
    train(*settings(run), *words, "--overwrite").ok()
    (old,) = run.parent.glob(f"{run.name}.old-*")
    stamp = old.name.removeprefix(f"{run.name}.old-")
    assert time.strptime(stamp, "%Y%m%dT%H%M%SZ")
    assert {**snapshot(old), ".": None} == before
    assert status(run)["step"] == 3
    assert history(run)[0]["event"] == "start"
    assert checkpoint_steps(run) == [3]
    assert not (run / "tensorboard").exists()


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
    assert [record["step"] for record in metrics(run)][:2] == [0, 1]  # its digest, its first step


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
