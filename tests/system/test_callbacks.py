"""Callbacks in whole runs: called on all ranks alike, and what they ask for is done by all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system import jobs
from tests.system.exact import COMMON, assert_same, assert_same_weights, records

ASKING = Path(__file__).with_name("asking.py")


def asking(*arguments: str) -> list[str]:
    return [*COMMON, "CALLBACKS", f"['{ASKING}:Asks {' '.join(arguments)}']"]


@pytest.mark.parametrize("ranks", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_a_callback_finishes_is_complete_and_exact(
    ranks: int | None, tmp_path: Path
) -> None:
    """Asked for after step 8, where a checkpoint is due, and done after step 9: also where the run
    goes on from the very checkpoint in between, with the callback's own state."""
    run, again = tmp_path / "run", tmp_path / "again"
    args = asking("request=finish", "after=8", f"rank={(ranks or 1) - 1}", f"notes={tmp_path}")
    jobs.train(*args, "OUTPUT_DIR", run, ranks=ranks).ok()
    status = jobs.status(run)
    assert (status["state"], status["step"]) == ("completed", 9)
    by = "Asks (rank 1)" if ranks else "Asks"
    assert status["reason"] == f"finished by {by}"
    assert jobs.checkpoint_steps(run)[-1] == 9 and 9 in jobs.values(run, "val/loss")
    # 3, 6 and 9 are records, 4, 8 and 9 checkpoints (and those of new bests), 5 and 9 evaluations.
    notes = [(tmp_path / f"rank{rank}").read_text().split("\n") for rank in range(ranks or 1)]
    assert all(note == notes[0] for note in notes)
    assert [n for n in notes[0] if "checkpoint" not in n] == [
        *("start 0", "record 3", "evaluation 5", "record 6", "record 9", "evaluation 9", "end 9"),
        "",
    ]
    assert {"checkpoint 4", "checkpoint 8", "checkpoint 9"} <= set(notes[0])

    start_from = ["--resume-from", run / "checkpoints/step_8", "OUTPUT_DIR", again]
    jobs.train(*args, *start_from, ranks=ranks).ok()
    assert records(again) == [record for record in records(run) if record["step"] > 8]
    assert jobs.status(again)["reason"] == status["reason"]
    assert jobs.state(again)["progress"] == jobs.state(run)["progress"]
    assert_same_weights(again, run)

    said = jobs.train(*args, "--resume", "--allow", "TRAIN.DURATION", "OUTPUT_DIR", run).ok()
    assert "this run is complete: step 9" in said.err
    start_from = ["--resume-from", run / "checkpoints/step_9", "OUTPUT_DIR", tmp_path / "no"]
    done = jobs.train(*args, *start_from)
    assert done.code == 2 and "is complete, at step 9" in done.err
    assert not (tmp_path / "no").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a callback."""
    run = tmp_path_factory.mktemp("whole") / "run"
    jobs.train(*COMMON, "OUTPUT_DIR", run).ok()
    return run


@pytest.mark.slow
def test_a_callback_that_stops_a_run_can_be_resumed(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = [*asking("request=stop", "after=6"), "OUTPUT_DIR", run]
    stopped = jobs.train(*args)
    assert stopped.code == 75, stopped.output
    status = jobs.status(run)
    assert (status["state"], status["step"], status["reason"]) == ("stopped", 7, "Asks")
    jobs.train(*args, "--resume").ok()
    assert_same(run, whole)


def test_extra_evaluations_and_checkpoints_change_nothing_else(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    jobs.train(*asking("request=evaluate", "after=6"), "OUTPUT_DIR", run).ok()
    assert set(jobs.values(run, "val/loss")) - set(jobs.values(whole, "val/loss")) == {7}
    evaluated = {"val/loss", "digest"}
    rest = [r for r in records(run) if r["step"] != 7 or not evaluated & r.keys()]
    assert rest == records(whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_may_take_long_for_its_end_alone(rank: int, tmp_path: Path) -> None:
    """As one that exports the model does; the others are done, and no failure."""
    args = asking("request=finish", "after=3", f"rank={rank}", "end_s=8")
    jobs.train(*args, "OUTPUT_DIR", tmp_path / "run", ranks=2).ok()
    assert jobs.status(tmp_path / "run")["state"] == "completed"
    assert not (tmp_path / "run/failure.json").exists()
