"""Repeats: a message is shown, then counted, and no count is lost."""

import logging

from hypothesis import given
from hypothesis import strategies as st

from launcher.telemetry.repeats import MOST, Repeats


def record(text: str, at: float, level: int = logging.WARNING) -> logging.LogRecord:
    made = logging.LogRecord("some.logger", level, "file.py", 1, text, None, None)
    made.created = at
    return made


def shown(repeats: Repeats, *texts: tuple[str, float]) -> list[str]:
    return [r.getMessage() for text, at in texts for r in repeats(record(text, at))]


def test_a_repeat_is_held_back_and_counted_when_its_minute_is_over() -> None:
    repeats = Repeats(60)
    assert shown(repeats, ("a", 0), ("a", 1), ("b", 2), ("a", 30)) == ["a", "b"]
    # Any later line brings it out.
    assert shown(repeats, ("c", 61)) == ["(repeated 2 times in 30 s) a", "c"]
    # A flood goes on as a line a minute.
    assert shown(repeats, ("a", 62), ("a", 100)) == []
    assert shown(repeats, ("d", 125)) == ["(repeated 2 times in 39 s) a", "d"]
    assert repeats.end() == []


def test_what_was_quiet_for_a_minute_is_new() -> None:
    assert shown(Repeats(60), ("a", 0), ("a", 61), ("a", 122)) == ["a", "a", "a"]


def test_the_level_and_the_logger_make_another_message() -> None:
    repeats = Repeats()
    assert repeats(record("a", 0)) and repeats(record("a", 0, logging.ERROR))


def test_another_exception_is_another_message() -> None:
    repeats = Repeats()
    for error in (ValueError("one"), ValueError("two")):
        failed = record("it failed", 0)
        failed.exc_info = (ValueError, error, None)
        assert repeats(failed) == [failed]


def test_a_count_keeps_the_place_and_the_extras() -> None:
    repeats = Repeats()
    first = record("a", 0)
    first.file_only = True
    repeats(first)
    repeats(record("a", 1))
    (told,) = repeats.end()
    assert (told.levelno, told.name, told.file_only) == (first.levelno, first.name, True)
    assert told.repeated == "a"


def test_memory_is_bounded_and_loses_no_count() -> None:
    repeats = Repeats()
    shown(repeats, ("a", 0), ("a", 0))
    lines = shown(repeats, *((f"line {i}", 0.0) for i in range(MOST)))
    assert len(repeats.seen) <= MOST
    assert "(repeated 1 times in 0 s) a" in lines


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 50)), max_size=40))
def test_every_message_is_shown_or_counted(waits: list[tuple[str, float]]) -> None:
    repeats, now, seen = Repeats(60), 0.0, []
    for text, wait in waits:
        now += wait
        seen += repeats(record(text, now))
    seen += repeats.end()
    told = [r.getMessage() for r in seen]
    for text in "ab":
        counted = [int(t.split()[1]) for t in told if t.endswith(f") {text}")]
        assert told.count(text) + sum(counted) == sum(t == text for t, _ in waits)
