"""Conditions, order, and keys that no run has."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.runs.run import Run, find
from launcher.runs.select import check, condition, ordered
from tests.runs.made import make_run, record


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    for number, rate in enumerate((0.1, 0.01, 0.5)):
        values = [record(1, val__accuracy=0.2 * number), record(2, val__accuracy=0.1)]
        state = "failed" if number == 2 else "completed"
        config = {"OPTIM.LR": rate, "OPTIM.NAME": "sgd", "TASK.DEEP": number > 0}
        config |= {"OPTIM.WARMUP": "" if number else "no", "MODEL.FREEZE": ["stem", "a b"][number:]}
        make_run(tmp_path / f"lr-{rate}", values, state, config)
    make_run(tmp_path / "run-10", [])
    make_run(tmp_path / "run-9", [])
    return list(find(tmp_path))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("OPTIM.LR=0.1", ["lr-0.1", "run-9", "run-10"]),
        ("OPTIM.LR = 1e-2", ["lr-0.01"]),
        ("OPTIM.LR<=0.1", ["lr-0.01", "lr-0.1", "run-9", "run-10"]),
        ("OPTIM.LR!=0.1", ["lr-0.01", "lr-0.5"]),
        ("OPTIM.NAME==sgd", ["lr-0.01", "lr-0.1", "lr-0.5"]),
        ("TASK.DEEP=true", ["lr-0.01", "lr-0.5"]),
        ("TASK.DEEP!=True", ["lr-0.1"]),
        ("OPTIM.WARMUP=", ["lr-0.01", "lr-0.5"]),
        ("OPTIM.WARMUP=no", ["lr-0.1"]),
        ("MODEL.FREEZE=[stem, 'a b']", ["lr-0.1"]),
        ("MODEL.FREEZE=[]", ["lr-0.5"]),
        ("OPTIM.LR=high", []),
        ("OPTIM.LR<high", []),
        ("OPTIM.LR!=high", ["lr-0.01", "lr-0.1", "lr-0.5", "run-9", "run-10"]),
        ("state=failed", ["lr-0.5"]),
        ("val/accuracy>0.1", []),
        ("val/accuracy>=0.1", ["lr-0.01", "lr-0.1", "lr-0.5"]),
        ("max:val/accuracy>0.3", ["lr-0.5"]),
        ("best:val/accuracy<0.3", ["lr-0.01", "lr-0.1"]),
        ("step>1", ["lr-0.01", "lr-0.1", "lr-0.5"]),
        ("run=lr-0.5", ["lr-0.5"]),
    ],
)
def test_conditions(text: str, found: list[str], runs: list[Run]) -> None:
    test = condition(text)
    check(runs, [test.key])
    assert [run.name for run in ordered([r for r in runs if test(r)], "run", False)] == found


@pytest.mark.parametrize("text", ["OPTIM.LR", "=1", "", "<2"])
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(UsageError, match="write KEY=VALUE"):
        condition(text)


@pytest.mark.parametrize(
    ("key", "reverse", "names"),
    [
        ("OPTIM.LR", False, ["lr-0.01", "lr-0.1", "run-9", "run-10", "lr-0.5"]),
        ("max:val/accuracy", True, ["lr-0.5", "lr-0.01", "lr-0.1", "run-9", "run-10"]),
        ("max:val/accuracy", False, ["lr-0.1", "lr-0.01", "lr-0.5", "run-9", "run-10"]),
    ],
)
def test_order(key: str, reverse: bool, names: list[str], runs: list[Run]) -> None:
    """Runs without a value come last both ways."""
    by_name = ordered(runs, "run", False)
    assert [run.name for run in ordered(by_name, key, reverse)] == names


def test_a_misspelt_key_is_a_mistake(runs: list[Run]) -> None:
    check(runs, ["min:val/accuracy", "OPTIM.LR", "age"])
    with pytest.raises(UsageError, match=r"no run has OPTIM.LRR \(did you mean OPTIM.LR\?\)"):
        check(runs, ["OPTIM.LRR"])
    check([], ["anything"])
