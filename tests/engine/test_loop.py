"""What the loop does after each step: what is due, once, also where the scaler skips steps."""

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.callbacks import Callbacks
from launcher.data.splits import GlobalBatch
from launcher.engine.agreement import Agreement
from launcher.engine.loop import Loop
from launcher.engine.step import TrainStep
from launcher.errors import RunError
from tests.engine.helpers import ALONE, Regression, fresh, unasked


class Step(TrainStep):
    """Does nothing."""

    def __init__(self, skips: tuple[int, ...]) -> None:
        self.skips, self.batches = skips, 0
        self.agreement = Agreement(ALONE.device, 1, deque())

    def __call__(self, batch: GlobalBatch, requests: frozenset[str]) -> tuple[bool, frozenset[str]]:
        list(batch.batches)
        self.batches += 1
        return self.batches - 1 in self.skips, frozenset()


class Scripted(Loop):
    """A loop over steps that do nothing, some of them skipped; notes what it does when."""

    def __init__(self, *words: object, skips: tuple[int, ...] = ()) -> None:
        state = fresh(Regression(), "TRAIN.BATCH_SIZE", 8, "TRAIN.DURATION", "3ep", *words)
        state.callbacks = Callbacks()
        state.data.start(0, threads=1)
        self.evaluations, self.records = list[int](), list[int]()
        self.saves: list[tuple[int, bool, dict[str, float]]] = []
        store = SimpleNamespace(is_best=lambda metrics, pending: False)
        saver: Any = SimpleNamespace(store=store, pending=None, save=self.note_save)
        evaluate: Any = self.evaluate_once
        super().__init__(ALONE, unasked(), state, Step(skips), evaluate, saver)
        recorder: Any = state.recorder
        recorder.write = lambda values: self.records.append(self.progress.step)

    def evaluate_once(self, model: Any, splits: Any, show: bool = False) -> dict[str, float]:
        self.evaluations.append(self.progress.step)
        return {"val/loss": 1.0}

    def note_save(self, captured: Any, manifest: dict[str, Any], last: bool) -> None:
        self.saves.append((manifest["step"], last, manifest["metrics"]))


@pytest.mark.parametrize(
    ("skips", "steps"), [((), [3, 6, 9]), ((2,), [3, 5, 8]), ((2, 3), [3, 4, 7]), ((8,), [3, 6, 8])]
)
def test_what_an_epochs_end_makes_due_is_done_at_the_next_step_where_its_own_is_skipped(
    skips: tuple[int, ...], steps: list[int]
) -> None:
    loop = Scripted(skips=skips)
    assert loop.train() is None
    assert loop.evaluations == steps
    assert [(step, last) for step, last, _ in loop.saves] == [(s, s == steps[-1]) for s in steps]
    assert all(metrics == {"val/loss": 1.0} for _, _, metrics in loop.saves)


@pytest.mark.parametrize("error", [ValueError, SystemExit])
@pytest.mark.parametrize("works", [0, 1])
def test_what_was_trained_before_an_evaluation_that_fails_is_saved(
    works: int, error: type[BaseException]
) -> None:
    """The first of an attempt: one that has worked before is not expected to fail."""
    loop = Scripted("CHECKPOINT.EVERY", "", "CHECKPOINT.KEEP_BEST", 0)
    saved: list[dict[str, Any]] = []
    loop.saver.save = lambda captured, *_: saved.append(captured)  # type: ignore[union-attr]

    def fails(model: Any, splits: Any, show: bool = False) -> dict[str, float]:
        if len(loop.evaluations) == works:
            raise error("a mistake in eval_step")
        return loop.evaluate_once(model, splits)

    loop.evaluation = fails  # type: ignore[assignment]
    with pytest.raises(error, match="a mistake in eval_step"):
        loop.train()
    told = [(s["progress"]["step"], s["due"], s["evaluated"]) for s in saved]
    assert told == ([] if works else [(3, ["checkpoint", "evaluate"], -1)])


def test_a_step_stands_once_and_keeps_its_metrics_where_the_last_batches_are_skipped() -> None:
    words = ("LOG.EVERY", "7step", "EVAL.EVERY", "7step", "CHECKPOINT.EVERY", "7step")
    loop = Scripted(*words, skips=(7, 8))
    loop.train()
    assert loop.records == [7, 7] and loop.evaluations == [7]  # a record, and the evaluation's
    assert loop.saves == [(7, False, {"val/loss": 1.0}), (7, True, {"val/loss": 1.0})]


def test_what_was_recorded_before_a_resume_is_not_recorded_again() -> None:
    words = ("LOG.EVERY", "7step", "EVAL.EVERY", "7step")
    loop = Scripted(*words, skips=(7, 8))
    loop.state.recorded = loop.state.evaluated = 7  # as a checkpoint at step 7 says
    loop.train()
    assert loop.records == [] and loop.evaluations == []


def test_a_run_is_not_complete_without_its_last_checkpoint() -> None:
    """Where the records before it cannot be written, the run says so and fails."""
    loop = Scripted()
    writer: Any = loop.state.recorder.writer
    writer.flush = lambda: False
    loop.save()  # a save under way is only skipped
    assert loop.saves == []
    with pytest.raises(RunError, match="no last checkpoint"):
        loop.save(last=True)
