"""`launcher config list`, `launcher config keys` and `launcher config diff`."""

import json
from pathlib import Path

import pytest

from launcher.cli.config import main, markdown
from launcher.config import KEYS
from tests.system.jobs import ROOT


def test_the_key_reference_is_up_to_date() -> None:
    advice = "run `launcher config keys --markdown > docs/config.md`"
    assert (ROOT / "docs/config.md").read_text(encoding="utf-8") == markdown(), advice


def test_every_key_has_a_comment_of_one_line() -> None:
    for key in KEYS:
        assert key.comment and "\n" not in key.comment
    assert len({key.name for key in KEYS}) == len(KEYS)


def test_keys_also_the_tasks_say_where_each_value_came_from(capsys: pytest.CaptureFixture) -> None:
    Path("x.yaml").write_text("SEED: 3\n")
    words = ["DATALOADER.NUM_WORKERS", "-1", "--json", "LOG.LEVEL=DEBUG", "TASK.NAME=digits"]
    assert main(["keys", "--config-file", "x.yaml", *words]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["SEED"]["value"], rows["SEED"]["origin"]) == (3, "x.yaml:1")
    assert rows["LOG.LEVEL"]["origin"] == "command line"
    assert rows["TASK.MODEL"] == {
        "key": "TASK.MODEL",
        "value": "convnet",
        "origin": "default",
        "comment": "Declared by Digits",
    }
    assert rows["OPTIM.LR"]["comment"] == "Learning rate before warm-up and schedule"


def test_a_piped_table_is_never_cut_off(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    path = "long/" * 60
    assert main(["keys", "OUTPUT_DIR", path]) == 0
    out = capsys.readouterr().out
    assert path in out
    assert all(key.comment in out for key in KEYS)


def test_diff_shows_both_values(capsys: pytest.CaptureFixture) -> None:
    Path("run").mkdir()
    Path("run/config.yaml").write_text("OUTPUT_DIR: o\nSEED: 1\nTASK: {WIDTH: 5}\n")
    Path("b.yaml").write_text("OUTPUT_DIR: o\nSEED: 2\n")
    assert main(["diff", "run", "b.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"key": "SEED", "a": 1, "b": 2},
        {"key": "TASK.WIDTH", "a": 5},
    ]
    assert main(["diff", "run", "b.yaml"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["key", "run", "b.yaml"],
        ["SEED", "1", "2"],
        ["TASK.WIDTH", "5", "(no", "such", "key)"],
    ]
    assert main(["diff", "run", "run"]) == 0
    assert capsys.readouterr().out == "no key differs\n"


def test_list_tells_what_ships(capsys: pytest.CaptureFixture) -> None:
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == sorted(path.stem for path in ROOT.glob("configs/*.yaml"))
    path = Path(rows["digits"]["path"])
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert path.samefile(ROOT / "configs/digits.yaml") and first == f"# {rows['digits']['comment']}"
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *rows]
    assert all(row["comment"] in line for row, line in zip(rows.values(), lines[1:], strict=True))


def test_diff_takes_names_of_configs_that_ship(capsys: pytest.CaptureFixture) -> None:
    assert main(["diff", "digits", "digits_lenet", "--json"]) == 0
    differing = {row["key"] for row in json.loads(capsys.readouterr().out)}
    assert {"TASK.MODEL", "OPTIM.NAME"} <= differing
