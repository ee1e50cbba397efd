"""What a task knows of its run: live, outside one, and in a loader worker."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import Task
from launcher.cli import main
from launcher.runtime.progress import Progress
from launcher.tasks import make_task
from launcher.tasks.run import LiveRun, Run
from tests.callbacks.scripted import FAIL_AT
from tests.engine.helpers import Regression, config, fresh, recording
from tests.system import jobs
from tests.system.exact import records

HOOKED = Path(__file__).with_name("hooked.py")
COMMON = (
    *("TRAIN.BATCH_SIZE", "8", "TRAIN.DURATION", "4ep", "LOG.EVERY", "1step"),
    *("EVAL.EVERY", "2ep", "CHECKPOINT.EVERY", "2step", "CHECKPOINT.KEEP_LAST", "99"),
    *("LOG.TENSORBOARD", "False", "OPTIM.LR", "0.5", "OPTIM.WARMUP", "2step"),
)


def words(run: Path, *more: str, kind: str = "Hooked") -> list[str]:
    return ["TASK.NAME", f"{HOOKED}:{kind}", *COMMON, "OUTPUT_DIR", str(run), *more]


def test_outside_a_run_it_is_that_of_one_process_at_its_start() -> None:
    class Mine(Task):
        pass

    run = Mine(config()).run
    assert (run.device, run.split, run.progress, run.done) == (
        *(torch.device("cpu"), "train", (0, 0, 0), 0.0),
    )
    assert (run.rank, run.world_size) == (0, 1)
    run.recorder.scalar("a", 1.0)
    for name in ("total_steps", "steps_per_epoch"):
        with pytest.raises(RuntimeError, match=rf"run\.{name} is not known outside a run: .*Run\("):
            getattr(run, name)
    given = Run(total_steps=100, steps_per_epoch=10)
    assert (given.total_steps, given.steps_per_epoch, given.done) == (100, 10, 0.0)


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, launcher.tasks.run; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def live(*words: object) -> tuple[LiveRun, Progress]:
    """That of a run of 23 samples, begun, and its progress."""
    run = LiveRun(recording())
    run.begin(fresh(Regression(), "TRAIN.BATCH_SIZE", 8, *words).data)
    return run, run.recorder.progress


def test_it_is_read_live_and_what_it_gives_is_a_copy() -> None:
    run, progress = live("TRAIN.DURATION", "2ep")
    before = run.progress
    assert (run.total_steps, run.steps_per_epoch, run.done) == (6, 3, 0.0)
    progress.advance(23, 23, skipped=True)  # by samples: a skipped step is done too
    assert run.done == 0.5 and before == (0, 0, 0) and run.progress == (0, 1, 23)
    with run.recorder.evaluating("val"):
        assert run.split == "val"
    progress.advance(46, 23, skipped=False)
    assert run.done == 1.0
    run, progress = live("TRAIN.DURATION", "4step")
    progress.advance(8, 23, skipped=True)
    progress.advance(8, 23, skipped=False)
    assert run.done == 0.25


def test_before_the_data_sets_are_there_their_length_is_not_known() -> None:
    with pytest.raises(RuntimeError, match=r"total_steps is not known before the data sets are"):
        _ = LiveRun(recording()).total_steps


def in_worker(run: Any) -> list[Any]:
    found: list[Any] = [run.rank, run.world_size, run.total_steps, run.steps_per_epoch]
    found.append(str(run.device))
    for name in ("progress", "done", "split"):
        try:
            getattr(run, name)
        except RuntimeError as error:
            found.append(str(error).partition(":")[0])
    run.recorder.scalar("a", 1.0)  # does nothing
    return found


@pytest.mark.parametrize("how", ["forked", "sent"])
def test_in_a_loader_worker_it_has_what_holds_there(how: str) -> None:
    run, _ = live("TRAIN.DURATION", "2ep")
    if how == "sent":
        found = in_worker(pickle.loads(pickle.dumps(run)))
    else:
        forked = multiprocessing.get_context("fork")
        here, there = forked.Pipe()
        worker = forked.Process(target=lambda: there.send(in_worker(run)))
        worker.start()
        found = here.recv()
        worker.join()
    told = "is not known in a loader worker, which fetches ahead of the training"
    names = [f"run.{name} {told}" for name in ("progress", "done", "split")]
    assert found == [0, 1, 6, 3, "cpu", *names]


def test_a_task_has_it_before_its_init_unless_the_name_is_its_own() -> None:
    class Plain:
        def __init__(self, cfg: object) -> None:
            self.seen = self.run  # type: ignore[attr-defined]

    class Own(Plain):
        def run(self) -> str:
            return "its own"

    recorder = recording()
    run = LiveRun(recorder)
    assert make_task(Plain, config(), recorder, run).seen is run
    assert make_task(Own, config(), recorder, run).run() == "its own"
    assert make_task(Task, config(), recorder, run).run is run


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_tells_its_task_all_of_it(workers: str, tmp_path: Path) -> None:
    """The task itself asserts what it sees at each step."""
    run = tmp_path / "run"
    assert main(["train", *words(run, "DATALOADER.NUM_WORKERS", workers)]) == 0
    assert jobs.values(run, "train/done") == {
        k + 1: (k // 3 * 20 + k % 3 * 8) / 80 for k in range(12)
    }
    assert jobs.values(run, "val/loss") == {6: 6.0, 12: 12.0}
    assert set(jobs.values(run, "val/split").values()) == {1.0}
    # Two steps of warm-up, then the task's own schedule over the ten that are left.
    factors = [1 / 3, 2 / 3, *(1 - k / 10 for k in range(10))]
    assert list(jobs.values(run, "train/lr").values()) == pytest.approx([f / 2 for f in factors])
    metrics = json.dumps(["val/loss", "val/split"])
    notes = (run / "notes0").read_text().splitlines()
    assert notes[0] == "start 0" and notes[-1] == "end 12"
    assert notes.index(f"evaluation of {metrics} 6") == notes.index("record 6") + 1
    assert notes.index("checkpoint 6") == notes.index("record 6") + 2


def test_an_evaluation_alone_tells_its_task_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", *words(run)]) == 0
    capfd.readouterr()
    assert main(["train", *words(run), "--eval-only"]) == 0
    assert json.loads(capfd.readouterr().out) == {"val/loss": 0.0, "val/split": 1.0}


def test_state_and_requests_of_a_task_are_exact_over_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for the end at its seventh batch: here with a checkpoint at steps 4 and 6."""
    run, broken = tmp_path / "run", tmp_path / "broken"
    more = ("TASK.ENOUGH", "7", "DATALOADER.NUM_WORKERS", "0")
    assert main(["train", *words(run, *more)]) == 0
    status = jobs.status(run)
    assert (status["state"], status["step"]) == ("completed", 8)
    assert status["reason"] == "finished by Hooked: 7 batches are enough"
    monkeypatch.setenv(FAIL_AT, "6")
    assert main(["train", *words(broken, *more)]) == 1
    monkeypatch.delenv(FAIL_AT)
    assert main(["train", *words(broken, *more), "--resume"]) == 0
    assert records(broken) == records(run) and jobs.status(broken)["reason"] == status["reason"]
    assert torch.equal(jobs.state(broken)["ranks"][0]["task"]["count"], torch.tensor([8, 8]))


@pytest.mark.parametrize(
    ("more", "kind", "told"),
    [
        (("OPTIM.SCHEDULE", "cosine"), "Hooked", "has a schedule, and OPTIM.SCHEDULE is cosine"),
        (("TASK.ODD", "True"), "Hooked", "rank/task/how is a pathlib"),
        ((), "Half", "Half has state_dict but no load_state_dict"),
    ],
)
def test_what_a_task_may_not_is_refused_before_anything_is_made(
    more: tuple[str, ...], kind: str, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    case = words(run, *more, kind=kind)
    assert main(["train", *case]) == 2
    said = capfd.readouterr().err
    assert told in said and "Traceback" not in said and not run.exists()


@pytest.mark.slow
def test_each_of_two_ranks_has_its_own_state_and_may_ask(tmp_path: Path) -> None:
    """Rank 1 asks at its seventh batch; a stop between leaves each rank's count as it was."""
    run, again, alone = (tmp_path / name for name in ("run", "again", "alone"))
    more = ("TASK.ENOUGH", "7", "TASK.RANK", "1", "DATALOADER.NUM_WORKERS", "0")
    jobs.train(*words(run, *more), ranks=2).ok()
    status = jobs.status(run)
    assert (status["state"], status["step"]) == ("completed", 8)
    assert status["reason"] == "finished by Hooked: 7 batches are enough (rank 1)"
    kept = [r["task"]["count"].tolist() for r in jobs.state(run, 4)["ranks"]]
    assert kept == [[4, 4], [4, 104]]
    assert (run / "notes0").read_text() == (run / "notes1").read_text()
    start = ("--resume-from", str(run / "checkpoints/step_4"))
    jobs.train(*words(again, *more), *start, ranks=2).ok()
    assert records(again) == [record for record in records(run) if record["step"] > 4]
    assert jobs.status(again)["reason"] == status["reason"]
    refused = jobs.train(*words(alone, *more), *start)
    assert refused.code == 2 and "--allow TASK_STATE" in refused.err and not alone.exists()
    jobs.train(*words(alone, *more), *start, "--allow", "TASK_STATE").ok()
    (begun,) = jobs.history(alone, "start")
    assert any("kept on 2 ranks, this run has 1" in line for line in begun["differs"])
    assert jobs.values(alone, "train/count")[5] == 2.0
