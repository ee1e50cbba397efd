"""Which checkpoints are kept: laws over any history of steps and scores."""

import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.checkpoint.store import Retention
from launcher.config import load_config

law = settings(deadline=None, max_examples=150)
STEPS_PER_EPOCH = 7
scores = st.one_of(st.none(), st.floats(), st.integers(-5, 5), st.just("3"))
histories = st.dictionaries(st.integers(1, 300), scores, max_size=15)
modes = st.sampled_from(["min", "max"])
periods = st.sampled_from(["", "20step", "2ep"])


def manifests(history: dict[int, Any]) -> list[dict[str, Any]]:
    return [
        {"step": s, "epoch": s // STEPS_PER_EPOCH, "metrics": {} if x is None else {"val/x": x}}
        for s, x in history.items()
    ]


def rule(last: int = 1, best: int = 0, every: str = "", mode: str = "min") -> Retention:
    return Retention(last, best, every, "val/x", mode)


@law
@given(histories, st.integers(1, 5), st.integers(0, 5), periods, modes)
def test_the_newest_and_the_best_are_always_kept_and_not_more_than_asked(
    history: dict[int, Any], last: int, best: int, every: str, mode: str
) -> None:
    """What is not a finite number is never best, and of equals the earlier is better."""
    rules, saved = rule(last, best, every, mode), manifests(history)
    numbers = {step: x for step, x in history.items() if isinstance(x, (int, float))}
    sign = 1 if mode == "min" else -1
    finite = {step: sign * x for step, x in numbers.items() if math.isfinite(x)}
    ranked = sorted(finite, key=lambda step: (finite[step], step))
    assert rules.ranked(saved) == ranked
    kept, asked = rules.keep(saved), {*sorted(history)[-last:], *ranked[:best]}
    assert asked <= kept <= history.keys()
    assert every or kept == asked


@law
@given(histories, st.integers(1, 60), st.sampled_from(["step", "ep"]))
def test_one_a_period_is_kept_for_good(history: dict[int, Any], period: int, unit: str) -> None:
    """Of each period that began and has a checkpoint, the first one stays."""
    kept = rule(every=f"{period}{unit}").keep(manifests(history))
    first: dict[int, int] = {}
    for step in sorted(history):
        count = step if unit == "step" else step // STEPS_PER_EPOCH
        if count >= period:
            first.setdefault(count // period, step)
    assert kept == set(first.values()) | set(sorted(history)[-1:])


@law
@given(histories, st.integers(1, 3), periods)
def test_dropping_as_one_goes_keeps_what_dropping_at_the_end_keeps(
    history: dict[int, Any], last: int, every: str
) -> None:
    rules = rule(last, 2, every)
    living: dict[int, Any] = {}
    for step in sorted(history):
        living[step] = history[step]
        living = {s: living[s] for s in rules.keep(manifests(living))}
    assert living.keys() == rules.keep(manifests(history))


def test_from_config() -> None:
    words = ["KEEP_LAST=3", "KEEP_BEST=2", "KEEP_EVERY=5ep", "METRIC=val/accuracy", "MODE=max"]
    cfg = load_config(None, [f"CHECKPOINT.{word}" for word in words], require_task=False).cfg
    assert Retention.from_config(cfg) == Retention(3, 2, "5ep", "val/accuracy", "max")
