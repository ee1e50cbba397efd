"""The thread that writes: nothing waits for it but a checkpoint, and nothing that fails ends it."""

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from launcher.telemetry.media import Media, OnHost
from launcher.telemetry.sinks import Record, Sink
from launcher.telemetry.writer import RECORD_BYTES, TOGETHER, Writer


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
        self.got += [item.value if isinstance(item, Media) else item["step"] for item in items]

    def close(self, completed: bool) -> None:
        self.got.append("completed" if completed else "closed")


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


made: list[tuple[Writer, tuple[Kept, ...]]] = []


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    while made:
        writer, sinks = made.pop()
        for sink in sinks:
            sink.gate.set()
        writer.close()


def start(*sinks: Kept, history: Any = None, open: Any = None, **options: Any) -> Writer:
    made.append((Writer(**options), sinks))
    made[-1][0].open(sinks, history or History(), **(open or {}))
    return made[-1][0]


def record(step: int) -> Record:
    return {"step": step, "epoch": 0, "samples": 0, "time": 1.0}


def text(content: str) -> Media:
    return Media("text", ["note"], content, 0)


def stuck(sink: Kept, **options: Any) -> Writer:
    """A writer whose thread stands still in this sink, with record 0."""
    sink.gate.clear()
    writer = start(sink, **options)
    writer.write(record(0))
    assert sink.entered.wait(60)
    return writer


def test_everything_reaches_every_sink_in_order() -> None:
    one, two = Kept(), Kept()
    writer = start(one, two)
    for step in range(1, 100, 2):
        writer.write(record(step))
        writer.show(text(f"after {step}"))
    assert writer.flush()
    expected = [x for step in range(1, 100, 2) for x in (step, f"after {step}")]
    assert one.got == two.got == expected
    writer.close(completed=True)
    assert one.got == [*expected, "completed"]


def test_what_a_stuck_sink_gets_is_written_later_and_nobody_waits() -> None:
    """The sink stands still while all of this is recorded: were a call to wait for it, the test
    would not come to its end."""
    sink = Kept()
    writer = stuck(sink)
    for step in range(1, 1000):
        writer.write(record(step))
    assert sink.got == []
    sink.gate.set()
    assert writer.flush()
    assert sink.got == list(range(1000))


def test_a_checkpoint_waits_for_a_stuck_sink_only_so_long() -> None:
    sink = Kept()
    writer = stuck(sink, flush_s=0.05)
    assert writer.flush() is False
    sink.gate.set()
    assert any(writer.flush() for _ in range(1000))


def test_a_failure_and_its_end_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """The history is on the same full disk: it is told when that has room again."""
    caplog.set_level(logging.INFO, "launcher")
    bad, good, history = Kept("bad"), Kept("good"), History(fails=3)
    writer = start(bad, good, history=history)
    for step in range(1, 8):
        bad.fails = 10**6 if step in (1, 2, 3, 5) else 0
        writer.write(record(step))
        assert writer.flush() is (bad.fails == 0)
    assert good.got == bad.got == list(range(1, 8))
    writer.close()
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert "bad cannot be written: OSError: [Errno 28]" in warning
    assert caplog.messages.count("bad is written again") == 1
    failed, recovered = history.lines
    assert (failed["event"], failed["sink"], failed["step"]) == ("sink", "bad", 1)
    assert "No space left" in failed["failed"]
    assert (recovered["event"], recovered["sink"]) == ("sink", "bad") and recovered["recovered"]


def test_what_failed_is_tried_again_without_anything_new() -> None:
    sink = Kept(fails=1)
    writer, beats = start(sink), threading.Event()
    writer.write(record(1))
    for _ in range(600):
        if sink.got:
            break
        beats.wait(0.1)
    assert sink.got == [1]


def test_only_what_a_checkpoint_needs_holds_it_up() -> None:
    writer = start(Kept(), Kept("TensorBoard", essential=False, fails=100))
    writer.write(record(1))
    assert writer.flush() is True


def test_a_sink_that_no_checkpoint_needs_costs_no_record() -> None:
    """It fails for so long that more waits for it than may wait."""
    needed, extra = Kept(), Kept("TensorBoard", essential=False, fails=10**6)
    writer = start(needed, extra, limit=8 * RECORD_BYTES)
    for step in range(100):
        writer.write(record(step))
        assert writer.flush()
    assert needed.got == list(range(100)) and not writer.lost
    extra.fails = 0
    writer.write(record(100))
    assert writer.flush() and len(extra.got) < 8 and extra.got[-1] == 100


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
    assert (good.got, bad.got) == ([0, 1, 2, 3, 4], [2, 3, 4])
    assert sum("TypeError: a bug" in r.message for r in caplog.records) == 1


def test_a_try_to_write_costs_no_more_than_a_part() -> None:
    """And what was written is not tried again."""
    sink = Kept()
    writer = stuck(sink)
    for step in range(1, 3 * TOGETHER):
        writer.write(record(step))
    sink.fails = 2
    sink.gate.set()
    while not writer.flush():
        pass
    assert sink.got == [*range(3 * TOGETHER)] and sink.most == TOGETHER


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
    assert [x for x in sink.got if isinstance(x, int)] == list(range(10))
    assert sum(x is big.value for x in sink.got) == 1
    writer.close()
    assert "4 pictures, histograms and texts were left out" in caplog.text


def test_after_a_lost_record_no_checkpoint_follows() -> None:
    sink = Kept()
    writer = stuck(sink, limit=3 * RECORD_BYTES)
    for step in range(1, 10):
        writer.write(record(step))
    sink.gate.set()
    assert writer.flush() is False
    assert sink.got == [0, 1, 2]
    writer.write(record(10))
    assert writer.flush() is False and sink.got[-1] == 10


class Whole(Kept):
    def write(self, items: Sequence[Record | Media]) -> None:
        self.got += items


@pytest.mark.parametrize("error", [None, OSError("gone")])
def test_records_of_the_training_get_system_figures(error: Exception | None) -> None:
    def figures() -> dict[str, float]:
        if error is not None:
            raise error
        return {"system/x": 1.0}

    sink = Whole()
    writer = start(sink, open={"complete": figures})
    training, evaluation = {**record(1), "perf/step_s": 0.1}, record(1)
    writer.write(training)
    writer.write(evaluation)
    assert writer.flush()
    assert sink.got == [training if error else {**training, "system/x": 1.0}, evaluation]


def test_it_beats_when_nothing_is_written_also_after_an_error() -> None:
    beats = threading.Semaphore(0)

    def beat() -> None:
        beats.release()
        raise OSError("a stalled mount")

    start(open={"beat": beat})
    assert all(beats.acquire(timeout=60) for _ in range(2))


def test_close_comes_to_an_end_beside_a_stuck_sink(caplog: pytest.LogCaptureFixture) -> None:
    sink = Kept()
    writer = stuck(sink, close_s=0.05)
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
