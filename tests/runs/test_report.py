"""The page's content; tests/system/test_runs.py opens one in a browser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from launcher.runs.plot import POINTS
from launcher.runs.report import _curve, report
from launcher.runs.run import open_runs
from tests.runs.made import append, make_run, record, training


class Page(HTMLParser):
    """Tags with their attributes, and the text of the page and of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self.inside = "", [""], ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[1])


def test_everything_is_in_it(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", training(50), "failed", {"OPTIM.LR": 0.01})
    (b / "failure.json").write_text('{"rank": 3, "exception": "ValueError"}')
    append(b / "metrics.jsonl", "torn\n")
    page = Page(report(open_runs([a, b])))
    for word in ("val/accuracy", "OPTIM.LR", "0.01", "python train.py", "finish", "ValueError"):
        assert word in page.text
    assert "metrics.jsonl:7: no JSON" in page.text
    curves = page.data["curves"]
    assert page.data["runs"] == ["a", "b"] and list(curves)[:2] == ["val/accuracy", "val/loss"]
    loss = curves["train/loss"]
    assert [curve["run"] for curve in loss] == [0, 1]
    assert loss[1]["step"] == [10, 20, 30, 40, 50] and loss[1]["values"][0] == 10.0
    assert loss[1]["samples"][0] == 640 and loss[1]["time"][-1] == 40 / 3600


def test_it_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = Page(report(open_runs([make_run(tmp_path / "a")])))
    for _, attributes in page.tags:
        assert not {"src", "href", "action", "data"} & attributes.keys()
    policy = next(a["content"] for t, a in page.tags if "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'")
    assert not re.search(r"fetch\(|XMLHttp|import\(|url\((?!#)", "".join(page.scripts[1:]))


def test_whatever_a_run_is_called_it_is_text(tmp_path: Path) -> None:
    bad = "<img src=x onerror=alert(1)>&\"'</script><script>alert(2)</script>"
    name = bad.replace("/", "")
    path = make_run(tmp_path / name, [record(1, **{bad: 1.0}), record(2, **{bad: None})])
    (path / "environment.json").write_text(json.dumps({"command": [bad]}))
    (path / "failure.json").write_text(json.dumps({bad: bad}))
    (path / "config.yaml").write_text(json.dumps({"A": bad, "B": {"{{data}}": "{{title}}"}}))
    append(path / "history.jsonl", json.dumps({"event": bad, "step": bad, "why": bad}) + "\n")
    page = Page(report(open_runs([path])))
    assert {"img"}.isdisjoint(tag for tag, _ in page.tags)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert page.text.count("alert(1)") >= 6 and "B.{{data}}: {{title}}" in page.text
    assert page.data["curves"][bad][0]["values"] == [1.0, None]


def test_a_long_curve_keeps_its_extremes(tmp_path: Path) -> None:
    count = 3 * POINTS
    records = [record(step, a=float(np.sin(step))) for step in range(1, count + 1)]
    records[1234]["a"], records[4321]["a"], records[77]["a"] = 50.0, -50.0, None
    (run,) = open_runs([make_run(tmp_path / "a", records)])
    curve = _curve(run.table(), "a")
    assert len(curve["values"]) == len(curve["step"]) <= POINTS + 2
    assert 50.0 in curve["values"] and -50.0 in curve["values"]
    assert curve["step"][0] == 1 and curve["step"][-1] == count
    assert curve["step"] == sorted(curve["step"])
