"""The range test on tasks whose answer is known by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher import cli
from launcher.cli.find_lr import table, told
from launcher.debug.suggestion import Suggestion
from tests.system import jobs

TASK = Path(__file__).with_name("find_lr_task.py")
WORDS = ["OPTIM.MOMENTUM", "0", "TRAIN.BATCH_SIZE", "8", "LOG.MODEL_SUMMARY", "False"]


def words(name: str, *more: object) -> list[object]:
    return ["find-lr", "TASK.NAME", f"{TASK}:{name}", "--json", *WORDS, *more]


def found(ended: jobs.Ended, code: int = 0) -> Any:
    assert ended.code == code, ended.output
    return json.loads(ended.out)


def descent(rates: list[float], a: float) -> list[float]:
    """The losses after plain gradient descent on a bowl without noise, at these rates."""
    w, losses = torch.tensor(3.0, requires_grad=True), []
    optimizer = torch.optim.SGD([w])
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (0.5 * a * (w - 1) ** 2).backward()
        optimizer.step()
        losses.append(float(0.5 * a * (w.detach() - 1) ** 2))
    return losses


def test_the_curve_is_plain_descent_at_the_told_rates_and_nothing_stays(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run, temporary = tmp_path / "run", tmp_path_factory.mktemp("temporary")
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}\n")
    more = ["OUTPUT_DIR", run, "TASK.A", 400.0, "OPTIM.SCHEDULE", "cosine", "OPTIM.WARMUP", "5step"]
    with jobs.unchanged(tmp_path):
        asked = words("Bowl", *more, "--to", "1", "--steps", "60")
        got = found(jobs.launch(*asked, env={"TMPDIR": str(temporary)}))
    assert not list(temporary.glob("launcher-*"))
    rates, losses = zip(*got["curve"], strict=True)
    told = [1e-7 * 1e7 ** (i / 59) for i in range(len(rates))]
    np.testing.assert_allclose(rates, told, rtol=1e-6)
    np.testing.assert_allclose(losses, descent(list(rates), 400.0), rtol=1e-4, atol=1e-30)
    assert got["key"] == "OPTIM.LR" and 2 / 400 / 50 < got["suggestion"] < 2 / 400
    assert got["suggestion"] < got["lowest"] < got["rises"] and got["rises"] > 2 / 400


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, ["TRAIN.MICRO_BATCH_SIZE", "2"]),  # two in each of two rounds
        jobs.slow(3, ["TRAIN.PRECISION", "bf16"]),
        jobs.slow(None, ["TRAIN.PRECISION", "fp16"]),
    ],
)
def test_with_noise_on_ranks_and_in_any_precision(
    ranks: int | None, more: list[str], tmp_path: Path
) -> None:
    picture = tmp_path / "curve.png"
    all_ = [str(word) for word in words("Bowl", "TASK.NOISE", 0.5, "-o", picture, *more)]
    with jobs.Group(all_, ranks) if ranks else jobs.Forked(all_) as job:
        got = found(job.wait())
    assert 2 / 4 / 50 < got["suggestion"] < 2 / 4
    assert got["suggestion"] < got["rises"] < 8 * 2 / 4
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_task_with_an_optimiser_and_a_schedule_of_its_own() -> None:
    got = found(jobs.launch(*words("Own", "--from", "1e-5", "--steps", "50")))
    rates, losses = zip(*got["curve"], strict=True)
    np.testing.assert_allclose(rates[0], 1e-5, rtol=1e-6)
    np.testing.assert_allclose(losses, descent(list(rates), 4.0), rtol=1e-4, atol=1e-30)
    assert got["key"].endswith("build_optimizer")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("Flat", ["TASK.NOISE", "1"], "never falls clearly"),
        ("Bowl", ["--from", "1", "--to", "100"], "begin lower|begin at a lower rate"),
    ],
)
def test_no_suggestion_where_there_is_none(name: str, more: list[str], message: str) -> None:
    got = found(jobs.launch(*words(name, *more)), 1)
    assert got["suggestion"] is None and re.search(message, got["why"])


def test_phases_are_refused() -> None:
    ended = jobs.launch(*words("Phased"))
    assert ended.code == 2 and "the task has the phases a, b" in ended.err


def test_a_table_is_for_people() -> None:
    rates, losses = np.array([1e-3, 1e-2, 0.1, 1.0]), np.array([2.0, 1.0, 0.5, np.nan])
    lines = table(rates, losses, losses)
    assert lines[0].split() == ["rate", "loss", "smoothed"]
    assert [line.count("#") for line in lines[1:]] == [21, 7, 0, 32]
    found = Suggestion(0.0123, 0.1, None, losses, "why")
    assert told(found, "OPTIM.LR") == "OPTIM.LR 0.012: why."


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--from", "1", "--to", "0.1"], "--from 1 is not below --to 0.1"),
        (["--steps", "5"], "fewer than 20"),
        (["-o", "x.pdf"], "must end in .png or .svg"),
        (["-o", "nowhere/x.png"], "nowhere is no directory"),
        (["OPTIM.LRR", "1"], "did you mean OPTIM.LR"),
    ],
)
def test_mistakes_answer_at_once(more: list[str], message: str, capsys: Any) -> None:
    assert cli.main(["find-lr", "TASK.NAME", "digits", *more]) == 2
    assert message in capsys.readouterr().err
