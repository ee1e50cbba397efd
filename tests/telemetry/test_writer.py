"""The thread that writes: nothing waits for it but a checkpoint, and nothing that fails ends it."""

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch

from launcher.telemetry.media import Media, OnHost
from launcher.telemetry.sinks import Record, Sink
from launcher.telemetry.writer import RECORD_BYTES, TOGETHER, Writer
from tests.waiting import wait_until


class Kept(Sink):
    """Keeps what it gets, waits at its gate, and fails as often as it is told to."""

    def __init__(self, name: str = "kept", essential: bool = True, fails: int = 0) -> None:
        self.name, self.essential, self.fails = name, essential, fails
        self.got: list[Any] = []
        self.most = 0  # items at once
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.error: Exception = OSError(28, "No space left on device")

    def write(self, items: Sequence[Record | Media]) -> None:
        self.entered.set()
        self.most = max(self.most, len(items))
        assert self.gate.wait(60)
        if self.fails:
            self.fails -= 1
            raise self.error
        self.got += items

    def close(self, completed: bool) -> None:
        self.got.append("completed" if completed else "closed")


made: list[tuple[Writer, tuple[Kept, ...]]] = []


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    while made:
        writer, sinks = made.pop()
        for sink in sinks:
            sink.gate.set()
        writer.close()


def start(*sinks: Kept, writer: Writer | None = None, history: Any = None, **more: Any) -> Writer:
    """Open a writer; by default its history can be written."""
    writer = writer or Writer()
    made.append((writer, sinks))
    writer.open(sinks, history or Mock(return_value=True), **more)
    return writer


def stuck(sink: Kept, **options: float) -> Writer:
    """A writer whose thread stands still in this sink, with record 0."""
    sink.gate.clear()
    writer = start(sink, writer=Writer(**options))
    writer.write(record(0))
    assert sink.entered.wait(60)
    return writer


def record(step: int) -> Record:
    return {"step": step, "epoch": 0, "samples": 0, "time": 1.0}


def records(*steps: int) -> list[Record]:
    return [record(step) for step in steps]


def text(content: str) -> Media:
    return Media("text", ["note"], content, 0)


def test_everything_reaches_every_sink_in_order() -> None:
    one, two, shown = Kept(), Kept(), list[Any]()
    writer = start(one, two)
    for step in range(50):
        shown += [record(step), text(f"after {step}")]
        writer.write(shown[-2])
        writer.show(shown[-1])
    assert writer.flush()
    assert one.got == two.got == shown
    writer.close(completed=True)
    assert one.got == [*shown, "completed"]


def test_what_a_stuck_sink_gets_is_written_later_part_by_part_and_nobody_waits() -> None:
    """But a checkpoint, for so long. What was written is not tried again."""
    sink = Kept()
    writer = stuck(sink, flush_s=0.05)
    for step in range(1, 1000):
        writer.write(record(step))
    assert writer.flush() is False and sink.got == []
    sink.fails = 2
    sink.gate.set()
    wait_until(writer.flush)
    assert sink.got == records(*range(1000)) and sink.most == TOGETHER


def test_a_failure_and_its_end_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """The history is on the same full disk: it is told when that has room again."""
    caplog.set_level(logging.INFO, "launcher")
    bad, good = Kept("bad"), Kept("good")
    history = Mock(side_effect=[False, False, False, True, True])
    writer = start(bad, good, history=history)
    for step in range(1, 8):
        bad.fails = 10**6 if step in (1, 2, 3, 5) else 0
        writer.write(record(step))
        assert writer.flush() is (bad.fails == 0)
    assert good.got == bad.got == records(*range(1, 8))
    writer.close()
    reason = "OSError: [Errno 28] No space left on device"
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert f"bad cannot be written: {reason}" in warning
    assert caplog.messages.count("bad is written again") == 1
    failed = call("sink", step=1, sink="bad", failed=reason)
    assert history.mock_calls == [failed] * 4 + [call("sink", step=1, sink="bad", recovered=True)]


def test_what_failed_is_tried_again_without_anything_new() -> None:
    sink = Kept(fails=1)
    start(sink).write(record(1))
    wait_until(lambda: sink.got == [record(1)])


def test_a_sink_that_no_checkpoint_needs_costs_no_record() -> None:
    """It fails for so long that more waits for it than may wait."""
    needed, extra = Kept(), Kept("TensorBoard", essential=False, fails=10**6)
    writer = start(needed, extra, writer=Writer(limit=8 * RECORD_BYTES))
    for step in range(100):
        writer.write(record(step))
        assert writer.flush() is True
    assert needed.got == records(*range(100)) and not writer.lost
    extra.fails = 0
    writer.write(record(100))
    assert writer.flush() and len(extra.got) < 8 and extra.got[-1] == record(100)


@pytest.mark.parametrize("essential", [False, True])
def test_a_sink_with_a_bug_ends_nothing(essential: bool, caplog: pytest.LogCaptureFixture) -> None:
    """But no checkpoint follows what it did not write, if it is needed for that."""
    bad, good = Kept("bad", essential), Kept("good")
    bad.error = TypeError("a bug")
    writer = start(bad, good)
    for step in range(5):
        bad.fails = 10**6 if step < 2 else 0
        writer.write(record(step))
        assert writer.flush() is not essential
    assert (good.got, bad.got) == (records(0, 1, 2, 3, 4), records(2, 3, 4))
    assert sum("TypeError: a bug" in r.message for r in caplog.records) == 1


def test_pictures_are_left_out_before_records_are(caplog: pytest.LogCaptureFixture) -> None:
    sink, size = Kept(), 10 * RECORD_BYTES
    writer = stuck(sink, limit=8 * size)
    big = Media("image", ["x"], OnHost(torch.zeros(size, dtype=torch.uint8)), 0)
    for _ in range(5):
        writer.show(big)
    for step in range(1, 10):
        writer.write(record(step))
    sink.gate.set()
    assert writer.flush()  # every record is there, so a checkpoint may follow
    assert sink.got == [record(0), big, *records(*range(1, 10))]
    writer.close()
    assert "4 pictures, histograms and texts were left out" in caplog.text


def test_after_a_lost_record_no_checkpoint_follows() -> None:
    sink = Kept()
    writer = stuck(sink, limit=3 * RECORD_BYTES)
    for step in range(1, 10):
        writer.write(record(step))
    sink.gate.set()
    assert writer.flush() is False and sink.got == records(0, 1, 2)
    writer.write(record(10))
    assert writer.flush() is False and sink.got[-1] == record(10)


@pytest.mark.parametrize("error", [None, OSError("gone")])
def test_records_of_the_training_get_system_figures(error: Exception | None) -> None:
    sink = Kept()
    figures = Mock(return_value={"system/x": 1.0}, side_effect=error)
    writer = start(sink, complete=figures)
    training = {**record(1), "perf/step_s": 0.1}
    writer.write(dict(training))
    writer.write(record(1))
    assert writer.flush()
    assert sink.got == [{**training, **({} if error else {"system/x": 1.0})}, record(1)]


def test_it_beats_when_nothing_is_written_also_after_an_error() -> None:
    beat = Mock(side_effect=OSError("a stalled mount"))
    start(beat=beat)
    wait_until(lambda: beat.call_count >= 2)


def test_close_comes_to_an_end_beside_a_stuck_sink(caplog: pytest.LogCaptureFixture) -> None:
    writer = stuck(Kept(), close_s=0.05)
    writer.close()
    writer.close()
    assert "a sink is stuck" in caplog.text
    writer.write(record(2))
    assert writer.flush() is False


def test_a_writer_that_is_not_opened_takes_nothing() -> None:
    writer = Writer()
    writer.write(record(1))
    writer.show(text("x"))
    assert writer.flush() is True and not writer.lost
    writer.close()
