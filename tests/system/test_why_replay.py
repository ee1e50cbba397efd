"""Two runs once more around their first difference: where they part, and by which keys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.system import jobs
from tests.system.jobs import slow

TASK = Path(__file__).with_name("debug_task.py")
COMMON = [
    *("TRAIN.BATCH_SIZE", "8", "TRAIN.DURATION", "3ep", "LOG.EVERY", "1step"),
    *("LOG.TENSORBOARD", "False", "CHECKPOINT.EVERY", "6step", "CHECKPOINT.KEEP_LAST", "9"),
]
LABEL = ("% 3", "% 3 - (torch.arange(length) == 17).long() * 2")
LINE = ('batch["x"] * 2\n        logits', 'batch["x"] * 3\n        logits')


@pytest.fixture(scope="module", params=[None, slow(2)])
def first(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int | None]:
    run = tmp_path_factory.mktemp("why") / "run"
    train(run, request.param, TASK)
    return run, request.param


def train(run: Path, ranks: int | None, task: Path, *more: str) -> None:
    words = ["train", "TASK.NAME", f"{task}:Small", *COMMON, "OUTPUT_DIR", run, *more]
    with jobs.Group(words, ranks) if ranks else jobs.Forked(words) as job:
        job.wait().ok()


def why(one: Path, other: Path) -> dict[str, Any]:
    ended = jobs.launch("runs", "why", one, other, "--replay", "--json")
    assert ended.code == 1, ended.output
    return json.loads(ended.out)["replay"]


@pytest.mark.parametrize(
    ("change", "more", "where", "keys"),
    [
        slow(LABEL, (), "sample 17 has another content", None),
        slow(LINE, (), "the output of module 0 is the first that differs", None),
        slow((), ("TRAIN.SAMPLER", "sequential"), "takes other samples", ["TRAIN.SAMPLER"]),
        slow(
            (),
            ("OPTIM.MOMENTUM", "0.8", "OPTIM.WEIGHT_DECAY", "0.01", "EVAL.SAMPLES", "12"),
            "all is equal up to the loss; the update of 0.",
            ["OPTIM.MOMENTUM", "OPTIM.WEIGHT_DECAY", "EVAL.SAMPLES"],
        ),
        slow((), ("OPTIM.LR", "0.05", "LOG.LEVEL", "WARNING"), "step 1: all is", ["OPTIM.LR"]),
    ],
)
def test_a_planted_cause_is_found(
    first: Any, change: Any, more: tuple[str, ...], where: str, keys: Any, tmp_path: Path
) -> None:
    run, ranks = first
    task = tmp_path / TASK.name
    text = TASK.read_text()
    assert not change or change[0] in text
    task.write_text(text.replace(*change) if change else text)
    train(tmp_path / "run", ranks, task, *more)
    found = why(run, tmp_path / "run")
    assert where in found["where"] and sorted(found["keys"] or []) == sorted(keys or [])


@pytest.mark.slow
def test_a_bit_of_an_initial_weight_is_found(first: Any, tmp_path: Path) -> None:
    run, ranks = first
    state = jobs.state(run, 6)["model"]
    files = tmp_path / "one.pt", tmp_path / "other.pt"
    torch.save(state, files[0])
    state["2.weight"].view(torch.int32)[1, 2] ^= 1
    torch.save(state, files[1])
    runs = tmp_path / "a", tmp_path / "b"
    for place, file in zip(runs, files, strict=True):
        train(place, ranks, TASK, "MODEL.WEIGHTS", str(file))
    found = why(*runs)
    assert "the weights are others before step 1" in found["where"]
    assert found["keys"] == ["MODEL.WEIGHTS"]


@pytest.mark.slow
def test_two_equal_runs_are_told_apart_by_nothing(first: Any, tmp_path: Path) -> None:
    run, _ = first
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    ended = jobs.launch("runs", "why", run, tmp_path / "run", "--replay", "--json")
    assert ended.code == 0 and json.loads(ended.out)["replay"]["where"] is None
