"""Records as they come: rewinds are followed, and the end of the run is the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import tail as module
from launcher.runs.run import open_run
from launcher.runs.tail import tail
from tests.runs.made import GONE, append, event, lines, make_run, record, training


@pytest.mark.parametrize("block", [64, 1 << 16])  # lines are longer, or shorter
@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (2, [100, 100]),
        (4, [80, 90, 100, 100]),
        (99, [10, 20, 30, 40, 50, 50, 60, 70, 80, 90, 100, 100]),
    ],
)
def test_the_last_records(
    count: int, expected: list[int], block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    told = tail(open_run(make_run(tmp_path / "a")), count, False, as_json=True)
    assert [json.loads(line)["step"] for line in told] == expected


def test_a_line_for_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    path = make_run(tmp_path / "a", [record(20, train__loss=0.123456, val__x=None)])
    append(path / "metrics.jsonl", "{no record\n" + '{"step": 30, "torn')
    told = list(tail(open_run(path), 5, False))
    assert told == [
        "22:13:40  step 20  epoch 0  train/loss 0.1235  val/x nan",
        "--- no record: {no record",
    ]


class Story:
    """What happens to a run between two looks at it, instead of waiting."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.acts: list[Callable[[], Any]] = []

    def sleep(self, _: float) -> None:
        assert self.acts, "the run has ended, and tail has not"
        self.acts.pop(0)()

    def append(self, *records: dict[str, Any], torn: str = "") -> None:
        append(self.path / "metrics.jsonl", lines(list(records)) + torn)

    def end(self, state: str = "completed", **changed: Any) -> None:
        status = json.loads((self.path / "status.json").read_text())
        (self.path / "status.json").write_text(json.dumps({**status, "state": state, **changed}))


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Story:
    story = Story(make_run(tmp_path / "a", training(30), "running", updated=time.time()))
    monkeypatch.setattr(module.time, "sleep", story.sleep)
    return story


def test_new_records_until_the_end(story: Story) -> None:
    """Also one that comes in two parts, and the last one, written just before the end."""
    half = lines([record(50, a=1.0)])
    story.acts = [
        lambda: story.append(record(40, a=1.0), torn=half[:30]),
        lambda: story.append(torn=half[30:]),
        lambda: None,
        lambda: (story.append(record(60, a=1.0)), story.end(step=60, epoch=1)),
    ]
    told = list(tail(open_run(story.path), 1, True))
    assert [line.split()[2] for line in told[:-1]] == ["30", "40", "50", "60"]
    assert told[-1] == "--- completed: step 60, epoch 1"
    assert story.acts == []


@pytest.mark.parametrize("regrown", [False, True])
def test_a_rewind_is_followed(regrown: bool, story: Story) -> None:
    """The file is cut back to step 20, and may be longer than before at the next look."""
    again = [30, 40, 50, 60] if regrown else []

    def resume() -> None:
        records = [*training(20), *(record(step, again=1.0) for step in again)]
        (story.path / "metrics.jsonl").write_text(lines(records))

    history = story.path / "history.jsonl"
    story.acts = [
        lambda: story.append(record(40, a=1.0)),
        # As a resume does it; tail may look in between.
        lambda: append(history, lines([event("resume", 20)])),
        resume,
        lambda: story.append(record(70, again=1.0)),
        lambda: story.end("stopped"),
    ]
    told = [json.loads(line) for line in tail(open_run(story.path), 9, True, True)]
    assert told[:4] == [*training(30), record(40, a=1.0)]
    assert told[4] == {"rewound": 20}
    assert [one["step"] for one in told[5:]] == [*again, 70]


def test_a_run_that_was_set_aside(story: Story) -> None:
    """--overwrite: another run stands there."""

    def overwrite() -> None:
        story.path.rename(story.path.with_name("a.old"))
        make_run(story.path, [record(5, a=1.0)], "running", updated=time.time())

    past = time.time() - module.GRACE_S - 5
    ended = {"reason": "ValueError: x", "updated": past}
    story.acts = [overwrite, lambda: story.end("failed", **ended)]
    told = list(tail(open_run(story.path), 1, True))
    assert told[1] == "--- back to step 0" and "step 5" in told[2]
    assert told[3].startswith("--- failed (ValueError: x)") and len(told) == 4


@pytest.mark.parametrize(("state", "told"), [("running", "lost (process"), ("failed", "failed")])
def test_torchrun_may_start_it_again_for_a_while(state: str, told: str, story: Story) -> None:
    """For that long a run that was killed, or failed, is not over."""
    story.end(state, pid=GONE, updated=time.time())
    story.acts = [
        lambda: story.append(record(40, a=1.0)),
        lambda: story.end(state, pid=GONE, updated=time.time() - module.GRACE_S - 5),
    ]
    found = list(tail(open_run(story.path), 0, True))
    assert "step 40" in found[0] and found[1].startswith(f"--- {told}") and len(found) == 2


def test_records_that_are_not_there_yet(story: Story) -> None:
    (story.path / "metrics.jsonl").unlink()
    story.acts = [lambda: story.append(record(1, a=1.0)), story.end]
    assert len(list(tail(open_run(story.path), 5, True))) == 2
