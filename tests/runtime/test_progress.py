"""Progress is three integers; Every reads them."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config import parse_duration
from launcher.data.plan import Plan
from launcher.runtime.progress import Every, Progress, in_steps
from tests.data.helpers import plans


@settings(deadline=None, max_examples=100)
@given(plan=plans(), skips=st.sets(st.integers(0, 40)))
def test_advance_follows_the_plan(plan: Plan, skips: set[int]) -> None:
    """Samples and epochs count every global batch; steps only those that were not skipped."""
    progress = Progress()
    for i in range(3 * plan.steps_per_epoch):
        assert plan.batches_in(progress.samples) == i
        start, stop = plan.batch(i % plan.steps_per_epoch)
        progress.advance(stop - start, plan.samples_per_epoch, skipped=i in skips)
        assert progress.step == i + 1 - len([s for s in skips if s <= i])
        assert progress.epoch == (i + 1) // plan.steps_per_epoch
    assert progress.samples == 3 * plan.samples_per_epoch


@pytest.mark.parametrize(
    ("text", "reached"), [("2ep", True), ("3ep", False), ("99step", True), ("100step", False)]
)
def test_reached(text: str, reached: bool) -> None:
    duration = parse_duration(text)
    assert duration is not None
    assert Progress(step=99, epoch=2).reached(duration) is reached


def test_copy_stays_behind() -> None:
    progress = Progress(1, 0, 8)
    before = progress.copy()
    progress.advance(8, 16, skipped=False)
    assert before.as_dict() == {"step": 1, "epoch": 0, "samples": 8}
    assert progress.as_dict() == {"step": 2, "epoch": 1, "samples": 16}


@pytest.mark.parametrize(("text", "steps"), [("", 0), ("3ep", 30), ("7step", 7)])
def test_in_steps(text: str, steps: int) -> None:
    assert in_steps(text, steps_per_epoch=10) == steps


@pytest.mark.parametrize(
    ("text", "skips", "due"),
    [
        ("", (), []),
        ("10s", (), []),  # by the clock, not by progress
        ("1step", (), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("4step", (), [4, 8]),
        ("1ep", (), [3, 6, 9]),
        ("2ep", (), [6]),
        # A step that the scaler skips takes its samples but is no step: due once, and later.
        ("4step", (2, 4), [6, 10]),
        ("4step", (5,), [4, 9]),
        ("1step", (1, 2), [3, 4, 5, 6, 7, 8, 9, 10]),
        ("1ep", (3,), [3, 6, 9]),
    ],
)
def test_a_period_is_due_after_these_batches_and_none_but_seconds_elapse(
    text: str, skips: tuple[int, ...], due: list[int]
) -> None:
    every, progress, found = Every(text), Progress(), []
    for i in range(1, 11):
        before = progress.copy()
        progress.advance(1, 3, skipped=i in skips)
        if every.due(before, progress):
            found.append(i)
    assert found == due
    assert every.timed is (text == "10s") and not every.elapsed()


def test_every_is_due_once_where_a_stride_passes_it() -> None:
    assert Every("10step").due(Progress(step=8), Progress(step=31))


def test_every_in_seconds_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    every = Every("1min")
    assert every.timed and not every.elapsed()
    now = 159.9
    assert not every.elapsed()
    now = 160.0
    assert every.elapsed() and not every.elapsed()
    now = 219.9
    assert not every.elapsed()
    now = 400.0
    assert every.elapsed() and not every.elapsed()
