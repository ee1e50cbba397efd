"""Golden output at a fixed width."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType

from launcher.runs import run as module
from launcher.runs.compare import compare
from launcher.runs.index import Series
from launcher.runs.run import Run, find, open_run, open_runs
from launcher.runs.select import ordered
from launcher.runs.terminal import compare_tables, list_table, plot, seconds, show, sparkline
from tests.runs.made import START, make_run, record, training


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module.time, "time", lambda: START + 7300)
    monkeypatch.setattr("launcher.runs.terminal.moment", lambda value: f"t{value - START:+.0f}s")
    make_run(tmp_path / "digits-1")
    slow = {"OPTIM.LR": 0.01, "OPTIM.NAME": "adamw"}
    make_run(tmp_path / "digits-2", training(50), "failed", slow, reason="ValueError: loss")
    broken = {"rank": 1, "exception": "ValueError", "traceback": "line 1\nline [red]2"}
    (tmp_path / "digits-2" / "failure.json").write_text(json.dumps(broken))
    old = tmp_path / "old"
    old.mkdir()
    (old / "metrics.json").write_text('{"iteration": 19, "total_loss": 1.25}\n')
    os.utime(old / "metrics.json", (START, START))
    return tmp_path


def rendered(what: RenderableType) -> str:
    console = Console(width=80, color_system=None, highlight=False, force_terminal=False)
    with console.capture() as capture:
        console.print(what)
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def runs(root: Path) -> list[Run]:
    return ordered(list(find(root)), "run")


def test_list(root: Path) -> None:
    columns = ["run", "state", "step", "metric", "best", "last", "age", "duration"]
    assert rendered(list_table(runs(root), columns)) == (
        "run       state         step  metric        best  last    age  duration\n"
        "digits-1  completed  100/100  val/accuracy   0.9   0.9  2.0 h     2 min\n"
        "digits-2  failed       50/50  val/accuracy   0.8   0.8  2.0 h      50 s\n"
        "old       ?               19  total_loss    1.25  1.25  2.0 h\n"
    )


def test_list_of_other_columns(root: Path) -> None:
    columns = ["run", "OPTIM.LR", "OPTIM.NAME", "min:train/loss"]
    assert rendered(list_table(runs(root), columns)) == (
        "run       OPTIM.LR  OPTIM.NAME  min:train/loss\n"
        "digits-1       0.1                           1\n"
        "digits-2      0.01  adamw                    2\n"
        "old\n"
    )


def test_compare(root: Path) -> None:
    found = open_runs([root / "digits-1", root / "digits-2"])
    assert rendered(compare_tables(compare(found))) == (
        "config          digits-1  digits-2\n"
        "OPTIM.LR        0.1           0.01\n"
        "OPTIM.NAME      -            adamw\n"
        "TRAIN.DURATION  100step     50step\n"
        "\n"
        "metric              digits-1  digits-2\n"
        "train/loss    last       1 *         2\n"
        "train/loss    min        1 *         2\n"
        "train/lr      last       0.1       0.1\n"
        "val/accuracy  last     0.9 *       0.8\n"
        "val/accuracy  max      0.9 *       0.8\n"
        "val/loss      last       2 *         4\n"
        "val/loss      min        2 *         4\n"
    )


def test_compare_what_not_all_have_and_what_is_equal(root: Path) -> None:
    """Another program's run has no config: that is no difference. A metric that one lacks stands
    alone, unmarked; equals are all best."""
    found = compare(open_runs([root / "digits-1", root / "old"]), ["total_loss", "train/loss"])
    alone = {"key": "total_loss", "which": "last", "values": [None, 1.25], "best": []}
    assert found["config"] == {} and found["metrics"][0] == alone
    same = open_runs([root / "digits-1", make_run(root / "digits-3")])
    assert [row["best"] for row in compare(same, ["val/accuracy"])["metrics"]] == [[0, 1], [0, 1]]


def test_show(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)  # a path as long as that of any run here would be wrapped
    text = rendered(show(open_run(Path("digits-2")), [], 80))
    head, _, rest = text.partition("train/loss\n")
    assert head == (
        "digits-2  failed (ValueError: loss)\n"
        "  step 50 of 50, epoch 1, 6 records, 50 s under way\n"
        "  last sign of life t+50s\n"
        "  best val/accuracy 0.8 at step 50\n\n"
    )
    curve, _, rest = rest.partition("\nmetric")
    assert curve.splitlines()[0] == " 10 ⠙⠲⢤⣀" and curve.splitlines()[-2].startswith("  2 ")
    assert curve.splitlines()[-1].split() == ["10", "step", "50"]
    assert f"metric{rest}" == (
        "metric               last  min  max\n"
        "train/loss    █▄▂▁▁     2    2   10\n"
        "train/lr      ▁▁▁▁▁   0.1  0.1  0.1\n"
        "val/accuracy  ▁       0.8  0.8  0.8\n"
        "val/loss      ▁         4    4    4\n"
        "\n"
        "what happened\n"
        "  t+0s   start    step 0   world_size 1\n"
        "  t+50s  failure  step 50\n"
        "\n"
        "failure\n"
        "  rank: 1\n"
        "  exception: ValueError\n"
        "  traceback:\n"
        "    line 1\n"
        "    line [red]2\n"
        "\n"
        "environment\n"
        "  command: python train.py\n"
        "  versions: python 3.11.7\n"
    )


def series_of(values: list[float]) -> Series:
    series = Series()
    series.extend(np.arange(float(len(values))), np.array(values, float))
    return series


def test_curves_of_text() -> None:
    """Up and down; with one peak among many, which nothing averages away; constant; and none."""
    series = series_of([*range(32), *reversed(range(32))])
    assert sparkline(series, 8) == "▁▃▆██▆▃▁"
    lines = plot(series, 40, height=2)
    assert len(lines) == 3 and lines[0].startswith(" 31 ") and lines[1].startswith("  0 ")
    assert lines[-1].split() == ["0", "step", "63"]
    peak = series_of([0.0] * 54_321 + [1.0] + [0.0] * 45_678)
    assert plot(peak, 60)[0].strip("1 ⠀") != ""
    constant = series_of([3.0] * 10)
    assert sparkline(constant, 4) == "▁▁▁▁" and len(plot(constant, 40)) == 9
    assert sparkline(Series(), 8) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.4, "0 s"), (99, "99 s"), (100, "2 min"), (7200, "2.0 h"), (200000, "2.3 d")],
)
def test_spans(value: float | None, text: str) -> None:
    assert seconds(value) == text


def test_a_name_is_never_markup(root: Path) -> None:
    make_run(root / "x" / "[bold]run", [record(1, **{"[red]key": 1.0})])
    run = open_run(root / "x" / "[bold]run")
    run.name = "[bold]run"
    assert "[bold]run" in rendered(list_table([run], ["run"]))
    for shown in (show(run, [], 80), compare_tables(compare([run, run]))):
        assert "[red]key" in rendered(shown)
