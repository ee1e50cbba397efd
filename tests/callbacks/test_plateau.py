"""Rates that are lowered on a plateau, against torch's own ReduceLROnPlateau."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from launcher.callbacks.plateau import Plateau
from launcher.errors import UsageError
from launcher.optim.curves import constant, linear
from launcher.optim.schedules import Schedule
from tests.callbacks.helpers import view
from tests.callbacks.scripted import FAIL_AT, train, words
from tests.edges.test_zoo import same
from tests.system import jobs
from tests.system.exact import records


def sgd(*rates: Any) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": rate} for rate in rates])


def lowers(optimizer: Any, **arguments: Any) -> Plateau:
    run = view()
    object.__setattr__(run, "optimizers", {"": optimizer})
    return Plateau(run, **arguments)


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("seed", range(20))
def test_rates_are_those_of_torch(seed: int) -> None:
    draw = random.Random(seed)
    mode, factor, patience = draw.choice(["min", "max"]), draw.choice([0.1, 0.7]), seed % 4
    change, lowest = draw.choice([0.0, 0.3]), draw.choice([0.0, 0.004])
    ours, theirs = sgd(0.1, 0.03), sgd(0.1, 0.03)
    reduces = ReduceLROnPlateau(
        theirs, mode, factor, patience, change, threshold_mode="abs", min_lr=lowest, eps=0.0
    )
    how = {"mode": mode, "factor": factor, "patience": patience, "lowest": lowest}
    plateau, schedule = lowers(ours, **how, least_change=change), Schedule(constant(), 50, 0, True)
    for step in range(50):
        schedule.apply(ours, step)
        assert rates(ours) == rates(theirs), step
        value = draw.choice([draw.random(), float("nan"), 2.0])
        plateau.on_evaluation({"val/loss": value})
        reduces.step(value)
        if step % 7 == 3:  # goes on from here in another process
            state = plateau.state_dict()
            plateau = lowers(ours, **how, least_change=change)
            plateau.load_state_dict(state)
    assert rates(ours)[0] < 0.1


def test_a_decay_and_a_warm_up_go_on_from_the_lower_rate() -> None:
    optimizer, schedule = sgd(0.8, torch.tensor(0.4)), Schedule(linear(0), 10, 2)
    plateau = lowers(optimizer, factor=0.5, patience=0)
    tensor, halved = optimizer.param_groups[1]["lr"], 0
    for step in range(10):
        schedule.apply(optimizer, step)
        factor = schedule(step) * 0.5**halved
        assert rates(optimizer) == pytest.approx([0.8 * factor, 0.4 * factor])
        plateau.on_evaluation({"val/loss": 1.0 if step in (0, 1, 5) else -step})
        halved += step in (1, 5)
        assert rates(optimizer) == pytest.approx(
            [rate * schedule(step) * 0.5**halved for rate in (0.8, 0.4)]
        )
    assert halved == 2 and optimizer.param_groups[1]["lr"] is tensor


def test_rates_that_a_task_sets_itself_are_lowered_and_groups_without_one_left() -> None:
    optimizer, schedule = sgd(0.8, 0.4), Schedule(constant(), 10, 0, True)
    del optimizer.param_groups[1]["lr"]
    plateau = lowers(optimizer, factor=0.5, patience=0)
    for step in range(3):
        schedule.apply(optimizer, step)
        optimizer.param_groups[0]["lr"] = 0.3 * optimizer.param_groups[0]["initial_lr"]
        plateau.on_evaluation({"val/loss": 1.0})
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * 0.8 * 0.25)
    assert "lr" not in optimizer.param_groups[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"factor": 1.0}, "factor is 1.0, not a number between 0 and 1"),
        ({"factor": 0}, "factor is 0,"),
        ({"lowest": -1}, "lowest is -1, not a number, not < 0"),
        ({"patience": -1}, "patience is -1, not a whole number from 0 on"),
        ({"mode": "up"}, "mode is 'up', not min or max"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as error:
        Plateau(view(), **arguments)
    assert f"CALLBACKS: Plateau: {told}" in str(error.value)


@pytest.mark.parametrize("schedule", [(), ("OPTIM.SCHEDULE", "cosine", "OPTIM.WARMUP", "3step")])
def test_a_run_is_exact_where_it_goes_on_right_after_the_change(
    schedule: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two evaluations no better: lowered at steps 8 and 12, where checkpoints are."""
    run, again, broken = (tmp_path / name for name in ("run", "again", "broken"))

    def case(run: Path) -> list[str]:
        entry = "plateau patience=1 factor=0.5"
        return [*words(run, "Scripted", [3, 2, 2, 2], entry), *schedule]

    assert train(case(run)) == 0
    if not schedule:
        by_hand = sgd(0.08)
        reduces = ReduceLROnPlateau(by_hand, "min", 0.5, 1, threshold_mode="abs", threshold=0)
        expected = {}
        for step in range(1, 17):
            expected[step] = rates(by_hand)[0]
            if step % 2 == 0:
                reduces.step([3, 2, 2, 2][min(step // 2, 4) - 1])
        assert jobs.values(run, "train/lr") == expected and expected[16] == 0.02
    for step in (8, 12):
        start = ("--resume-from", str(run / f"checkpoints/step_{step}"), "--overwrite")
        assert train(case(again), *start) == 0
        assert records(again) == [record for record in records(run) if record["step"] > step]
        assert same(jobs.state(again)["model"], jobs.state(run)["model"])
    monkeypatch.setenv(FAIL_AT, "9")
    assert train(case(broken)) == 1
    monkeypatch.delenv(FAIL_AT)
    assert train(case(broken), "--resume") == 0
    assert records(broken) == records(run)
    assert same(jobs.state(broken)["optimizer"], jobs.state(run)["optimizer"])


@pytest.mark.slow
def test_all_ranks_lower_by_a_metric_of_the_training(tmp_path: Path) -> None:
    """Rank 0 alone has the record. Weights that differ between ranks end a run at the next save."""
    run = tmp_path / "run"
    entries = ("plateau metric=train/loss patience=0 factor=0.5", "best_weights")
    jobs.train(*words(run, "Scripted", [3, 2, 4], *entries), ranks=2).ok()
    losses, expected, best, rate = jobs.values(run, "train/loss"), {}, float("inf"), 0.08
    for step, loss in losses.items():
        expected[step] = rate
        rate, best = (rate, loss) if loss < best else (rate * 0.5, best)
    assert jobs.values(run, "train/lr") == pytest.approx(expected) and rate < 0.08
    log = (run / "logs/rank0.log").read_text()
    assert "weights of step 4, the best" in log
    assert "has not got better for 1 record: learning rate times 0.5" in log
