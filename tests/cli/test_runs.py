"""`launcher runs`: what it prints, its exit codes, and what it does without."""

import json
import sys
from pathlib import Path

import pytest

from tests.cli.launched import imported_by, launch, run
from tests.runs.made import append, lines, make_run, record, training
from tests.system.jobs import Job

Captured = pytest.CaptureFixture[str]
SHOWING = ("list", "show runs/a", "compare runs/a runs/b")
READERS = (*SHOWING, "report runs/a", "export runs/a -o x.csv")


@pytest.fixture(autouse=True)
def two_runs(alone: None) -> None:
    make_run(Path("runs/a"), config={"LOG.TENSORBOARD": False})
    make_run(Path("runs/b"), training(50), "failed", {"OPTIM.LR": 0.01})


def runs(words: str) -> object:
    return run(f"runs {words}")


def said(words: str, capsys: Captured) -> str:
    """What a command prints that ends well."""
    assert runs(words) == 0
    return capsys.readouterr().out


def test_help_names_every_verb(capsys: Captured) -> None:
    out = said("--help", capsys)
    verbs = ("list", "show", "status", "tail", "compare", "plot", "export", "verify", "report")
    assert all(f"    {verb} " in out for verb in verbs)


def test_list(capsys: Captured) -> None:
    """Also in a pipe nothing is cut off."""
    make_run(Path("runs", "long" * 40))
    assert [line.split()[:3] for line in said("list", capsys).splitlines()] == [
        ["run", "state", "step"],
        ["a", "completed", "100/100"],
        ["b", "failed", "50/50"],
        ["long" * 40, "completed", "100/100"],
    ]


def test_list_chooses_orders_and_shows_what_is_asked_for(capsys: Captured) -> None:
    words = "list runs --sort val/accuracy --reverse --columns run,OPTIM.LR --json"
    assert json.loads(said(words, capsys)) == [
        {"path": "runs/a", "run": "a", "OPTIM.LR": 0.1},
        {"path": "runs/b", "run": "b", "OPTIM.LR": 0.01},
    ]
    (row,) = json.loads(said("list --where OPTIM.LR=0.1 --where val/accuracy>0.5 --json", capsys))
    assert (row["run"], row["best"], row["step"], row["total"]) == ("a", 0.9, 100, 100)


def test_a_folder_without_runs(capsys: Captured) -> None:
    Path("empty").mkdir()
    assert runs("list empty --json") == 0
    assert capsys.readouterr() == ("[]\n", "launcher: no runs below empty\n")


def test_show(capsys: Captured) -> None:
    out = said("show runs/a", capsys)
    assert "runs/a  completed" in out and "best val/accuracy 0.9 at step 100" in out
    found = json.loads(said("show runs/b --json", capsys))
    assert found["metrics"]["val/loss"]["min"] == {"step": 50, "value": 4.0}
    assert (found["state"], found["failure"], found["config"]["OPTIM.LR"]) == ("failed", None, 0.01)
    assert [event["event"] for event in found["history"]] == ["start", "failure"]


def test_tail(capsys: Captured) -> None:
    assert json.loads(said("tail runs/a -n 1 --json", capsys)) == training(100)[-1]
    lines = said("tail runs/a -f", capsys).splitlines()
    assert len(lines) == 11 and lines[-1] == "--- completed: step 100, epoch 2"


def test_compare(capsys: Captured) -> None:
    out = said("compare runs/a runs/b", capsys)
    assert "OPTIM.LR" in out and "0.9 *" in out
    found = json.loads(said("compare runs/a runs/b --key val/loss --json", capsys))
    assert found["runs"] == ["a", "b"] and found["config"]["OPTIM.LR"] == [0.1, 0.01]
    assert found["metrics"][0]["values"] == [2.0, 4.0] and found["metrics"][0]["best"] == [0]


def test_plot() -> None:
    pytest.importorskip("matplotlib")
    options = "--key val/accuracy --key train/loss --x samples --smooth 0.5 -o p.svg"
    assert runs(f"plot runs/a runs/b {options}") == 0
    assert "val/accuracy" in Path("p.svg").read_text()


def test_export_and_report(capsys: Captured) -> None:
    assert runs("export runs/a runs/b -o all.csv") == 0
    assert "18 records of 2 runs in all.csv" in capsys.readouterr().err
    assert len(Path("all.csv").read_text().splitlines()) == 19
    assert runs("report runs/a runs/b") == 0
    assert "<title>a, b</title>" in Path("report.html").read_text()


def test_verify(capsys: Captured) -> None:
    assert runs("verify runs/a --json") == 1
    found = json.loads(capsys.readouterr().out)
    assert [one["where"] for one in found] == ["checkpoints"]  # none was made
    make_run(Path("runs/c"), training(50), "running", {"LOG.TENSORBOARD": False})
    assert runs("verify runs/c") == 0
    assert capsys.readouterr().out == "runs/c: as promised (6 records)\n"


def test_damaged_lines_are_told_and_no_reason_to_stop(capsys: Captured) -> None:
    append(Path("runs/a/metrics.jsonl"), "torn {\n" * 5 + lines([record(110, train__loss=0.5)]))
    for words in READERS:
        assert runs(words) == 0
        err = capsys.readouterr().err
        assert "runs/a/metrics.jsonl:13: no JSON" in err and "2 more" in err
    assert "torn" not in Path("x.csv").read_text() and "110" in Path("x.csv").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("list absent", "absent is no directory"),
        ("list --where OPTIM.LR", "write KEY=VALUE"),
        ("list --sort val/acuracy", "did you mean val/accuracy?"),
        ("list --columns run,LR", "no run has LR"),
        ("show runs/a --key val/los", "did you mean val/loss?"),
        ("compare runs/a runs/b --key los", "no run has los"),
        ("show absent", "absent does not exist"),
        ("show runs", "runs holds no run; below it are runs/a, runs/b"),
        ("compare runs/a cache", "cache holds no run"),
        ("export runs/a -o x.txt", "must end in .csv, .parquet or .jsonl"),
        ("plot runs/a -o x.pdf", "must end in .png or .svg"),
        ("report runs/a -o absent/x.html", "absent is no directory"),
    ],
)
def test_mistakes_exit_with_2(words: str, told: str, capsys: Captured) -> None:
    Path("cache").mkdir(exist_ok=True)
    assert runs(words) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [*READERS, "--help", "status runs/a", "tail runs/a", "plot runs/a -o p.svg", "verify runs/b"],
)
def test_what_is_not_imported(words: str) -> None:
    """torch never; TensorBoard for verify alone, and nothing heavy for --help."""
    if words.startswith("plot"):
        pytest.importorskip("matplotlib")
    Path("runs/b/tensorboard").mkdir()
    verifies = words.startswith("verify")
    imported = imported_by(f"runs {words}", int(verifies))
    assert "yacs" in imported  # the list was read
    assert not imported & {"torch", "pandas", "pyarrow"}
    assert words != "--help" or not imported & {"numpy", "orjson", "rich", "psutil"}
    assert ("tensorboard" in imported) == verifies


@pytest.mark.parametrize("words", ["tail runs/a -n 100", "list", "show runs/a", "list --json"])
def test_a_reader_that_leaves_early(words: str) -> None:
    """`launcher runs list | head -1`."""
    command = f"set -o pipefail; {sys.executable} -m launcher runs {words} | true"
    ended = Job(["bash", "-c", command], {}, Path.cwd()).wait()
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.parametrize("words", ["show runs/a", "tail runs/ü --json", "list"])
def test_an_output_that_is_not_in_utf8(words: str) -> None:
    """No character is a reason to stop, and JSON is in UTF-8 anyway."""
    make_run(Path("runs/ü"), [record(1, **{"Güte": 1.0})])
    ended = launch(f"runs {words}", PYTHONIOENCODING="ascii").ok()
    if "--json" in words:
        assert json.loads(ended.out)["Güte"] == 1.0


ODD = {
    "metrics.jsonl: types": '{"step": 1, "time": "now", "a": "x", "b": {}, "c": [], "d": null}\n',
    "metrics.jsonl: extremes": '{"step": 1, "time": 1e300, "a": 1e308}\n'
    '{"step": 999999999999, "a": -1e308}\n',
    "metrics.jsonl: names": '{"step": 1, "[bold]": 1, "\\u001b[31m": 2, "a\\nb": 3, "": 4}\n' * 2,
    "metrics.jsonl: deep": "[" * 10000 + "\n",
    "metrics.jsonl: digits": '{"step": ' + "9" * 400 + "}\n",
    "metrics.jsonl: ends": '{"step": 1, "a": 1}\r\n\n \n{"step": 2, "a": 1}',
    "history.jsonl: types": '{"event": [], "step": {}, "time": "t"}\n'
    '{"event": "resume", "time": 1e300}\n[]\n',
    "status.json: extremes": '{"state": "running", "step": 1, "epoch": 0, "updated": 1e300}',
    "environment.json: types": '{"total_steps": "many", "ranks": [1, {"a": []}], "git": 3}',
    "failure.json: types": '{"log": [], "traceback": ["a", 1], "rank": null}',
    "config.yaml: circle": "a: &x {b: *x}\n",
    "config.yaml: types": "1: 2\n? [a]\n: 3\nd: 2024-01-01\nCHECKPOINT: {METRIC: [1], MODE: 3}\n",
}


@pytest.mark.parametrize("odd", ODD)
def test_whatever_stands_in_a_run_it_is_read(odd: str, capsys: Captured) -> None:
    """As far as it can be, by every command, without an exception and without a control sequence
    on the terminal."""
    Path("runs/a", odd.partition(":")[0]).write_text(ODD[odd])
    for words in (*READERS, "tail runs/a", "list --json", "show runs/a --json"):
        assert runs(words) == 0
        assert "\x1b" not in capsys.readouterr().out
    assert runs("verify runs/a") in (0, 1)


def test_a_file_that_cannot_be_read_is_a_message(capsys: Captured) -> None:
    Path("runs/a/metrics.jsonl").unlink()
    Path("runs/a/metrics.jsonl").mkdir()
    for words in ("tail runs/a", "export runs/a -o x.csv", "report runs/a"):
        assert runs(words) == 1
        assert "metrics.jsonl: Is a directory" in capsys.readouterr().err
    assert runs("list") == 0
