"""The thread that writes: nothing waits for it but a checkpoint, and nothing that fails ends it."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from launcher.telemetry import background
from launcher.telemetry.background import RECORD_BYTES, Background
from launcher.telemetry.media import Media, OnHost
from launcher.telemetry.recorder import Sink

HERE = {"epoch": 0, "samples": 0, "time": 1.0}


class Kept(Sink):
    """A sink that keeps what it gets, waits at its gate, and fails as often as it is told to."""

    def __init__(self, name: str = "kept", essential: bool = True) -> None:
        self.name, self.essential = name, essential
        self.got: list[Any] = []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.fails = 0
        self.error: Exception = OSError(28, "No space left on device")
        self.waiting: list[Any] = []

    def write(self, record: dict[str, Any]) -> None:
        self.waiting.append(record["step"])

    def show(self, media: Media) -> None:
        self.waiting.append(media.value)

    def finish(self) -> None:
        self.waiting.append("finish")

    def flush(self) -> None:
        self.entered.set()
        assert self.gate.wait(60)
        if self.fails:
            self.fails -= 1
            raise self.error
        self.got += self.waiting
        self.waiting = []

    def close(self) -> None:
        self.flush()
        self.got.append("closed")


class History:
    def __init__(self, fails: int = 0) -> None:
        self.lines: list[dict[str, Any]] = []
        self.fails = fails

    def __call__(self, event: str, step: int, **details: Any) -> bool:
        if self.fails:
            self.fails -= 1
            return False
        self.lines.append({"event": event, "step": step, **details})
        return True


made: list[Background] = []


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    while made:
        one = made.pop()
        for guarded in one.guarded:
            guarded.sink.gate.set()  # type: ignore[attr-defined]
        one.close()


def start(*sinks: Kept, history: Any = None, **options: Any) -> Background:
    made.append(Background(sinks, history or History(), **options))
    return made[-1]


def record(step: int) -> dict[str, Any]:
    return {"step": step, **HERE}


def text(content: str) -> Media:
    return Media("text", ["note"], content, 0)


def test_everything_reaches_every_sink_in_order() -> None:
    one, two = Kept(), Kept()
    thread = start(one, two)
    for step in range(1, 100, 2):
        thread.write(record(step))
        thread.show(text(f"after {step}"))
    assert thread.flush()
    expected = [x for step in range(1, 100, 2) for x in (step, f"after {step}")]
    assert one.got == two.got == expected
    thread.finish()
    thread.close()
    assert one.got == [*expected, "finish", "closed"]


def test_what_a_stuck_sink_gets_is_written_later_and_nobody_waits() -> None:
    """The sink stands still while all of this is recorded: were a call to wait for it, the test
    would not come to its end."""
    sink = Kept()
    sink.gate.clear()
    thread = start(sink)
    thread.write(record(0))
    assert sink.entered.wait(60)
    for step in range(1, 1000):
        thread.write(record(step))
    assert sink.got == []
    sink.gate.set()
    assert thread.flush()
    assert sink.got == list(range(1000))


def test_a_checkpoint_waits_for_a_stuck_sink_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "FLUSH_S", 0.05)
    sink = Kept()
    sink.gate.clear()
    thread = start(sink)
    thread.write(record(1))
    assert thread.flush() is False
    sink.gate.set()
    monkeypatch.setattr(background, "FLUSH_S", 60)
    assert thread.flush() is True


def test_a_failure_is_told_once_and_once_in_the_history(caplog: pytest.LogCaptureFixture) -> None:
    """The history is on the same full disk: it is told when that has room again."""
    caplog.set_level(logging.INFO, "launcher")
    bad, good, history = Kept("bad"), Kept("good"), History(fails=3)
    bad.fails = 5
    thread = start(bad, good, history=history)
    for step in range(1, 8):
        thread.write(record(step))
        assert thread.flush() is (step > 5)
    assert good.got == bad.got == list(range(1, 8))
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "bad cannot be written: OSError: [Errno 28]" in warnings[0]
    assert "bad is written again" in caplog.messages
    (line,) = history.lines
    assert (line["event"], line["sink"], line["step"]) == ("sink", "bad", 1)
    assert "No space left" in line["failed"]


def test_only_what_a_checkpoint_needs_holds_it_up() -> None:
    extra = Kept("TensorBoard", essential=False)
    extra.fails = 100
    thread = start(Kept(), extra)
    thread.write(record(1))
    assert thread.flush() is True


def test_a_sink_with_a_bug_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Kept("bad", essential=False), Kept("good")
    bad.error, bad.fails = TypeError("a bug"), 100
    thread = start(bad, good)
    for step in range(5):
        thread.write(record(step))
    assert thread.flush()
    assert good.got == list(range(5))
    assert sum("TypeError: a bug" in r.message for r in caplog.records) == 1


def test_pictures_are_left_out_before_records_are(caplog: pytest.LogCaptureFixture) -> None:
    sink = Kept()
    sink.gate.clear()
    size = 10 * RECORD_BYTES
    thread = start(sink, media_limit=2 * size, record_limit=4 * size)
    thread.write(record(0))
    assert sink.entered.wait(60)
    big = Media("image", ["x"], OnHost(torch.zeros(size, dtype=torch.uint8)), 0)
    for _ in range(5):
        thread.show(big)
    for step in range(1, 10):
        thread.write(record(step))
    sink.gate.set()
    assert thread.flush()  # every record is there, so a checkpoint may follow
    assert [x for x in sink.got if isinstance(x, int)] == list(range(10))
    assert sum(x is big.value for x in sink.got) == 1
    thread.close()
    assert "4 pictures, histograms and texts were left out" in caplog.text


def test_after_a_lost_record_no_checkpoint_follows() -> None:
    sink = Kept()
    sink.gate.clear()
    thread = start(sink, record_limit=3 * RECORD_BYTES)
    thread.write(record(0))
    assert sink.entered.wait(60)
    for step in range(1, 10):
        thread.write(record(step))
    sink.gate.set()
    assert thread.flush() is False
    assert sink.got == [0, 1, 2]
    thread.write(record(10))
    assert thread.flush() is False and sink.got[-1] == 10


def system_figures(error: Exception | None) -> dict[str, float]:
    if error is not None:
        raise error
    return {"system/x": 1.0}


class Whole(Kept):
    def write(self, record: dict[str, Any]) -> None:
        self.waiting.append(record)


@pytest.mark.parametrize("error", [None, OSError("gone")])
def test_records_of_the_training_get_system_figures(error: Exception | None) -> None:
    sink = Whole()
    thread = start(sink, figures=lambda: system_figures(error))
    training, evaluation = {**record(1), "perf/step_s": 0.1}, record(1)
    thread.write(training)
    thread.write(evaluation)
    assert thread.flush()
    assert sink.got == [training if error else {**training, "system/x": 1.0}, evaluation]
    assert "system/x" not in training


def test_a_forked_process_has_no_part_in_it() -> None:
    """A loader worker's copy of the queue has no thread behind it: nothing may wait for one."""
    sink = Kept()
    thread = start(sink)
    thread.write(record(1))
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        thread.write(record(2))
        thread.show(text("x"))
        thread.flush()
        os._exit(7 if thread.queue.empty() or thread.taken == RECORD_BYTES else 8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert thread.flush() and sink.got == [1]


def test_close_comes_to_an_end_beside_a_stuck_sink(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "CLOSE_S", 0.05)
    sink = Kept()
    sink.gate.clear()
    thread = start(sink)
    thread.write(record(1))
    thread.close()
    thread.close()
    assert "a sink is stuck" in caplog.text
    thread.write(record(2))
    assert thread.flush() is False


def test_a_slow_sink_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that takes 50 ms a write; a single one of these is nothing to tell of."""
    monkeypatch.setattr(background, "QUICK_S", 0.04)
    monkeypatch.setattr(background, "SLOW_S", 0.015)
    sink, history = Kept("slow"), History()
    flush = sink.flush

    def slow() -> None:
        time.sleep(0.05)
        flush()

    thread = start(sink, history=history)
    monkeypatch.setattr(sink, "flush", slow)
    thread.write(record(1))
    assert thread.flush()
    assert history.lines == []
    for step in range(2, 20):
        thread.write(record(step))
        assert thread.flush()
    (line,) = history.lines
    assert line["sink"] == "slow" and line["slow_s"] >= 0.05 and 1 < line["step"] < 20
    (told,) = [r.message for r in caplog.records if "is slow" in r.message]
    assert told.startswith("slow is slow: 0.0")
    assert sink.got == list(range(1, 20))
