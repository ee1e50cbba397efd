"""`launcher sweep`: the files it writes, what it refuses, and how `runs` reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config import flatten, load_config
from launcher.tasks import resolve_task
from tests.cli.launched import imported_by, run
from tests.runs.made import make_run, record
from tests.system.jobs import snapshot, unchanged

Captured = pytest.CaptureFixture[str]
BASE = "TASK: {NAME: sine}\nTRAIN: {DURATION: 40step}\nOUTPUT_DIR: elsewhere\n"
GRID = "--grid OPTIM.LR=0.1,3e-2 OPTIM.NAME=sgd,adamw"


@pytest.fixture(autouse=True)
def base() -> None:
    Path("base.yaml").write_text(BASE)


def resolved(file: str | Path, *words: str) -> dict[str, Any]:
    return flatten(load_config(str(file), words, resolve_task).cfg)


def test_a_point_is_its_base_with_its_values(capsys: Captured) -> None:
    assert run(f"sweep base.yaml {GRID} --random 2 TASK.NOISE=log(1e-3,1) --seed 7 -o dir") == 0
    told = json.loads(Path("dir/sweep.json").read_text())
    assert told["seed"] == 7 and len(told["points"]) == 8
    for number, (name, values) in enumerate(told["points"].items()):
        assert name == f"{number:03d}" and list(values) == ["OPTIM.LR", "OPTIM.NAME", "TASK.NOISE"]
        words = [f"{key}={value}" for key, value in values.items()]
        by_hand = resolved("base.yaml", *words, f"OUTPUT_DIR={os.getcwd()}/dir/runs/{name}")
        assert resolved(f"dir/configs/{name}.yaml") == by_hand
    # From anywhere, and with what the base says today.
    Path("base.yaml").write_text(BASE + "SEED: 5\n")
    assert resolved("dir/configs/003.yaml")["SEED"] == 5
    assert "8 points in dir" in capsys.readouterr().out


def test_a_base_that_ships_is_named_in_short() -> None:
    assert run("sweep digits --grid SEED=3 -o dir") == 0
    assert resolved("dir/configs/000.yaml")["SEED"] == 3


def test_the_same_call_again_changes_nothing(capsys: Captured) -> None:
    words = f"sweep base.yaml {GRID} -o dir"
    assert run(words) == 0
    Path("dir/sweep.sbatch").write_text("mine by now")
    with unchanged(Path("dir")):
        assert run(words) == 0
    assert "this very sweep of 4 points" in capsys.readouterr().out
    before = snapshot(Path("dir"))
    Path("dir/configs/002.yaml").unlink()  # as a crash would leave it
    assert run(words) == 0
    assert set(snapshot(Path("dir"))) == set(before)


def test_files_beside_the_base_are_found_from_the_point() -> None:
    Path("project").mkdir()
    task = "from launcher.tasks.sine import Sine\n\n\nclass Mine(Sine):\n    pass\n"
    Path("project/mine.py").write_text(
        task + "\n\nclass Seen:\n    def __init__(self, run, n=0): 0\n"
    )
    text = "TASK: {NAME: 'mine.py:Mine'}\nCALLBACKS: ['mine.py:Seen n=3', early_stopping]\n"
    Path("project/base.yaml").write_text(text + "OPTIM: {NAME: 'mine.py:SGD'}\n")
    assert run("sweep project/base.yaml --grid SEED=1,2 -o dir") == 0
    found = yaml.safe_load(Path("dir/configs/001.yaml").read_text())
    file = f"{os.getcwd()}/project/mine.py"
    assert found["TASK"] == {"NAME": f"{file}:Mine"} and found["SEED"] == 2
    assert found["OPTIM"] == {"NAME": f"{file}:SGD"}
    assert found["CALLBACKS"] == [f"{file}:Seen n=3", "early_stopping"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("base.yaml -o dir", "a sweep needs --grid or --random"),
        ("none.yaml --grid SEED=1 -o dir", "none.yaml  no such file"),
        ("base.yaml --grid OPTIM.LRR=1,2 SEED=x,0.5 -o dir", "3 mistakes in the config"),
        ("base.yaml --grid OPTIM.LRR=1,2 -o dir", "unknown key (did you mean OPTIM.LR?)"),
        ("base.yaml --grid TASK.NOISES=1,2 -o dir", "TASK.NOISES: unknown key"),
        ("base.yaml --grid OPTIM.WARMUP=1ep,90s -o dir", "OPTIM.WARMUP: '90s'"),
        ("base.yaml --grid OUTPUT_DIR=a,b -o dir", "OUTPUT_DIR is no key to sweep over"),
        ("base.yaml --grid OPTIM.LR=0.1,1e-1 -o dir", "points 000 and 001 are the same"),
        ("base.yaml --random 9 SEED=int(1,3) -o dir", "are the same (SEED="),
        ("base.yaml --grid SEED=1 -o base.yaml", "base.yaml cannot be written: Not a directory"),
        ("base.yaml --grid SEED=1 -o .", "holds something else"),
    ],
)
def test_mistakes_are_told_and_nothing_is_made(words: str, told: str, capsys: Captured) -> None:
    with unchanged(Path.cwd()):
        assert run(f"sweep {words}") == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("other", ["--grid SEED=1,3", "--grid SEED=1,2 --seed 4"])
def test_another_sweep_in_its_place(other: str, capsys: Captured) -> None:
    assert run("sweep base.yaml --grid SEED=1,2 -o dir") == 0
    with unchanged(Path("dir")):
        assert run(f"sweep base.yaml {other} -o dir") == 2
    assert "dir holds another sweep" in capsys.readouterr().err


def test_without_torch() -> None:
    assert "torch" not in imported_by(f"sweep base.yaml {GRID} -o dir")


def points() -> None:
    """A sweep of four points: two that are through, one that failed, one that has not begun."""
    assert run(f"sweep base.yaml {GRID} -o dir") == 0
    for name, loss, state in (("000", 2.0, "completed"), ("001", 1.0, "completed")):
        lr, optimizer = 0.1, ("sgd", "adamw")[int(name)]
        config = {"OPTIM.LR": lr, "OPTIM.NAME": optimizer, "OUTPUT_DIR": name}
        make_run(Path("dir/runs") / name, [record(50, val__loss=loss)], state, config)
    config = {"OPTIM.LR": 0.03, "OPTIM.NAME": "sgd"}
    make_run(Path("dir/runs/002"), [record(50, val__loss=9.0)], "failed", config)


def test_runs_list_shows_the_points_as_one_sweep(capsys: Captured) -> None:
    points()
    capsys.readouterr()
    assert run("runs list dir") == 0
    head, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[:5] == ["run", "OPTIM.LR", "OPTIM.NAME", "state", "step"]
    assert [line[0] for line in lines] == ["000", "001", "002", "003"]
    assert lines[1][1:4] == ["0.1", "adamw", "completed"] and lines[3][1:4] == [
        *("0.03", "adamw", "waiting")
    ]
    assert run("runs list dir --json --where state=waiting") == 0
    (waiting,) = json.loads(capsys.readouterr().out)
    assert (waiting["run"], waiting["OPTIM.LR"]) == ("003", 0.03)
    assert run("runs list dir --columns run,step --sort step") == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["run", "step"]


def test_runs_compare_has_a_line_a_point(capsys: Captured) -> None:
    points()
    capsys.readouterr()
    assert run("runs compare dir --key val/loss") == 0
    told = capsys.readouterr()
    head, *lines = (line.split() for line in told.out.splitlines())
    assert head == ["run", "OPTIM.LR", "OPTIM.NAME", *(["val/loss", "last", "val/loss", "min"])]
    assert lines[1] == ["001", "0.1", "adamw", "1", "*", "1", "*"] and len(lines) == 3
    assert "1 of 4 points have not begun" in told.err
    assert run("runs compare dir --key val/loss --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == ["000", "001", "002"] and found["metrics"][0]["values"] == [2, 1, 9]
    # A directory is one run to whoever takes one, and all of them to whoever takes several.
    assert run("runs export dir -o all.csv") == 0
    assert {row.split(",")[0] for row in Path("all.csv").read_text().splitlines()[1:]} == {
        *("000", "001", "002")
    }


def test_a_sweep_without_a_run(capsys: Captured) -> None:
    assert run("sweep base.yaml --grid SEED=1,2 -o dir") == 0
    assert run("runs compare dir") == 2
    assert "no point of dir has begun" in capsys.readouterr().err
    Path("dir/sweep.json").write_text("{")
    assert run("runs list dir") == 2
    assert "sweep.json cannot be read" in capsys.readouterr().err
