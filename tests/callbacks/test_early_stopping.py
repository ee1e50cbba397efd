"""When a run has seen enough, against the rule written down by hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from launcher.callbacks import resolve
from launcher.callbacks.early_stopping import EarlyStopping
from launcher.errors import RunError, UsageError
from tests.callbacks.helpers import view
from tests.callbacks.scripted import FAIL_AT, train, words
from tests.system import jobs
from tests.system.exact import records

NAN, INF = float("nan"), float("inf")


def asked(watch: EarlyStopping, values: list[float]) -> list[int]:
    """At which of the evaluations it asks for the end."""
    asks = [watch.on_evaluation({"val/loss": value}) for value in values]
    assert set(asks) <= {None, "finish"}
    return [n for n, request in enumerate(asks, 1) if request]


@pytest.mark.parametrize(
    ("arguments", "values", "when", "reason"),
    [
        ({}, [3, 2, 2, 2, 2], 5, "val/loss 2 has not got better for 3 evaluations"),
        ({"patience": 1}, [3, 3], 2, "val/loss 3 has not got better for 1 evaluation"),
        ({"patience": 2}, [3, 4, 2.5, 2.6, 2.5], 5, "val/loss 2.5 has not got better for 2 evalua"),
        ({"patience": 2, "least_change": 0.5}, [3, 2.6, 2.5], 3, "val/loss 3 has not"),
        ({"patience": 2, "least_change": 0.5}, [3, 2.6, 2.4, 2.3, 1.8], None, ""),
        ({"patience": 2, "mode": "max"}, [1, 2, 3, 3, 2], 5, "val/loss 3 has not"),
        ({"diverged": 9}, [3, 9, 9.5], 3, "val/loss 9.5 is past 9"),
        ({"diverged": 0.2, "mode": "max"}, [0.5, 0.2, 0.1], 3, "val/loss 0.1 is past 0.2"),
        ({}, [3, NAN], 2, "val/loss is nan"),
        ({}, [3, -INF], 2, "val/loss is -inf"),
        ({"nonfinite": False}, [NAN, 3, NAN, NAN, INF], 5, "val/loss 3 has not got better for 3"),
        ({"nonfinite": False}, [NAN, NAN, 3, 2, NAN], None, ""),
    ],
)
def test_it_ends_where_the_rule_says(
    arguments: dict[str, Any], values: list[float], when: int | None, reason: str
) -> None:
    watch = EarlyStopping(view(), **arguments)
    assert asked(watch, values) == ([when] if when else [])
    assert watch.reason.startswith(reason) and bool(watch.reason) == bool(when)
    for cut in range(len(values)):  # and so it does where it goes on from any evaluation
        first, second = (EarlyStopping(view(), **arguments) for _ in range(2))
        early = asked(first, values[:cut])
        second.load_state_dict(first.state_dict())
        assert early + [cut + n for n in asked(second, values[cut:])] == ([when] if when else [])


def test_what_another_metric_had_is_not_taken_up() -> None:
    before = EarlyStopping(view(), patience=1)
    asked(before, [1])
    now = EarlyStopping(view(), patience=1, mode="max")
    now.load_state_dict(before.state_dict())
    assert asked(now, [0.5]) == []


def test_a_metric_of_the_training_is_watched_in_its_records(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = EarlyStopping(view(), metric="train/error", patience=2)
    assert watch.on_evaluation({"val/loss": NAN}) is None
    with caplog.at_level(logging.WARNING):
        assert [watch.on_record({"train/loss": 1.0}) for _ in range(4)] == [None] * 4
    (warning,) = caplog.messages
    assert "waits for train/error" in warning and "it has train/loss" in warning
    asks = [watch.on_record({"train/error": value}) for value in (1.0, 2.0, 1.0)]
    assert asks == [None, None, "finish"]
    assert watch.reason == "train/error 1 has not got better for 2 records"


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("mode=least", "mode is 'least', not min or max"),
        ("patience=0", "patience is 0, not a whole number from 1 on"),
        ("patience=2.5", "patience is 2.5"),
        ("patience=true", "patience is True"),
        ("least_change=-1e-3", "least_change is -0.001"),
        ("least_change=small", "least_change is 'small'"),
        ("diverged=.inf", "diverged is inf, not a number"),
        ("nonfinite=1", "nonfinite is 1, not true or false"),
        ("metric=3", "metric is 3, not a recorded name"),
        ("metric=loss", "loss is none of an evaluation"),
        ("metric=perf/step_s", "perf/step_s is none of an evaluation"),
    ],
)
def test_wrong_arguments_are_told_before_the_start(entry: str, told: str) -> None:
    ((made, arguments),) = resolve([f"early_stopping {entry}"], [])
    with pytest.raises(UsageError, match="CALLBACKS: EarlyStopping: ") as error:
        made(view(), **arguments)
    assert told in str(error.value)


def test_arguments_that_it_does_not_have_and_names_that_are_none() -> None:
    with pytest.raises(UsageError, match=r"CALLBACKS: 'early_stopping wait=3': .*'wait'"):
        resolve(["early_stopping wait=3"], [])
    with pytest.raises(UsageError, match=r"early_stopping, plateau \(did you mean early_stopping"):
        resolve(["early_stoping"], [])


def test_a_metric_that_never_comes_is_told() -> None:
    run = view()
    run.cfg.EVAL.EVERY = ""
    with pytest.raises(UsageError, match=r"val/loss never comes: EVAL\.EVERY is ''"):
        EarlyStopping(run)
    EarlyStopping(run, metric="train/loss")

    class Told:
        @classmethod
        def metrics(cls) -> list[str]:
            return ["loss", "accuracy"]

    with pytest.raises(UsageError, match=r"val/acc is not among .*: val/loss, val/accuracy"):
        EarlyStopping(view(task=Told()), metric="val/acc")
    with pytest.raises(UsageError, match=r"test/loss never comes: .* EVAL\.SPLITS \['val'\]"):
        EarlyStopping(view(), metric="test/loss")
    run = view()
    run.cfg.EVAL.SPLITS = ["train", "test"]
    for metric in ("test/loss", "train_eval/loss", "test_raw/loss"):
        EarlyStopping(run, metric=metric)
    with pytest.raises(RunError, match=r"val/acc is none of .*: val/loss, val/error"):
        EarlyStopping(view(), metric="val/acc").on_evaluation({"val/loss": 1.0, "val/error": 2.0})


ENDS = "finished by EarlyStopping: val/loss 2 has not got better for 2 evaluations"


def assert_ended(run: Path, step: int, reason: str = ENDS) -> None:
    status = jobs.status(run)
    assert (status["state"], status["step"], status["reason"]) == ("completed", step, reason)
    assert jobs.state(run)["progress"]["step"] == step
    assert [r.get("reason") for r in jobs.history(run) if r["event"] == "finish"] == [reason]


def test_a_run_ends_with_its_reason_also_resumed_at_the_evaluation_that_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks at step 8, and the run is complete after step 9."""
    run, again, broken = (tmp_path / name for name in ("run", "again", "broken"))
    tells = [3, 2, 2, 2]
    stopping = "early_stopping patience=2"
    assert train(words(run, "Scripted", tells, stopping)) == 0
    assert_ended(run, 9)
    for step in (6, 8):
        start = ("--resume-from", str(run / f"checkpoints/step_{step}"), "--overwrite")
        assert train(words(again, "Scripted", tells, stopping), *start) == 0
        assert_ended(again, 9)
        assert records(again) == [record for record in records(run) if record["step"] > step]
    for fails in ("8", "9"):
        monkeypatch.setenv(FAIL_AT, fails)
        case = words(broken, "Scripted", tells, stopping)
        assert train(case, "--overwrite") == 1
        monkeypatch.delenv(FAIL_AT)
        assert train(case, "--resume") == 0
        assert_ended(broken, 9)
        assert records(broken) == records(run)


def test_a_run_ends_by_what_its_records_say(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopping = "early_stopping metric=train/loss diverged=1e-9"
    assert train(words(run, "Scripted", [1], stopping)) == 0
    loss = jobs.values(run, "train/loss")[1]
    reason = f"finished by EarlyStopping: train/loss {loss:.6g} is past 1e-09"
    assert_ended(run, 2, reason)


def test_mistakes_touch_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(words(run, "Scripted", [1], "early_stopping mode=least")) == 2
    assert "mode is 'least', not min or max" in capfd.readouterr().err and not run.exists()
