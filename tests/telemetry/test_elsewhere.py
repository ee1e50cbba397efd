"""Warnings of several ranks: each seen once, and always seen."""

import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from launcher.runtime.board import Unreachable
from launcher.telemetry import elsewhere
from launcher.telemetry.elsewhere import Elsewhere


class Board:
    """The ranks' board, in memory; `gate` holds its answers up."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.gate, self.reachable, self.asked = threading.Event(), True, 0
        self.gate.set()

    def first(self, name: str, value: Any) -> Any:
        assert self.gate.wait(60)
        self.asked += 1
        if not self.reachable:
            raise Unreachable
        return self.values.setdefault(name, value)


class Rank:
    """A rank's warnings, and what of them is shown."""

    def __init__(self, rank: int) -> None:
        self.shown: list[str] = []
        self.held = Elsewhere(rank, lambda record: self.shown.append(record.getMessage()))

    def warn(self, *texts: str, **extra: str) -> None:
        for text in texts:
            record = logging.LogRecord("py.warnings", 30, "file.py", 1, text, None, None)
            record.__dict__.update(extra)
            self.held.add(record)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "WAIT_S", 0.1)


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def ranks(board: Board) -> Iterator[tuple[list[Rank], ExitStack]]:
    """Three ranks on one board, and what ends them."""
    made = [Rank(number) for number in range(3)]
    with ExitStack() as stack:
        for rank in made:
            stack.enter_context(rank.held.beside(board))  # type: ignore[arg-type]
        yield made, stack


Ranks = tuple[list[Rank], ExitStack]


def test_of_all_ranks_rank_0_shows_it_also_when_it_is_the_last(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "WAIT_S", 1.0)
    made, end = ranks
    for rank in reversed(made):
        time.sleep(0.1)
        rank.warn("of all\nwith a second line")
    made[2].warn("of one")
    end.close()
    shown = [sorted(rank.shown) for rank in made]
    assert shown == [["of all\nwith a second line"], [], ["of one"]]


def test_of_two_other_ranks_one_shows_it(ranks: Ranks) -> None:
    made, end = ranks
    for rank in made[1:]:
        rank.warn("of two")
    end.close()
    assert sorted(rank.shown for rank in made) == [[], [], ["of two"]]


def test_a_count_goes_with_its_message(ranks: Ranks) -> None:
    """Ranks count differently; who showed the message shows its count."""
    made, end = ranks
    for number, rank in enumerate(made):
        rank.warn("often")
        rank.warn(f"(repeated {number} times in 60 s) often", repeated="often")
    end.close()
    assert [rank.shown for rank in made] == [["often", "(repeated 0 times in 60 s) often"], [], []]


def test_warnings_from_before_there_is_a_board_wait_for_it(board: Board) -> None:
    early = Rank(1)
    early.warn("of all", "of one")
    board.first("warning/" + key("of all"), 0)
    assert early.shown == []
    with early.held.beside(board):  # type: ignore[arg-type]
        pass
    assert early.shown == ["of one"]


def key(text: str) -> str:
    return hashlib.sha256(f"30 py.warnings {text}".encode()).hexdigest()


def test_who_logs_does_not_wait_for_the_board(ranks: Ranks, board: Board) -> None:
    """The board answers only after all of this was logged."""
    made, end = ranks
    board.gate.clear()
    for rank in made:
        rank.warn(*(f"warning {number}" for number in range(100)))
    assert len(made[0].shown) == 100
    board.gate.set()
    end.close()
    assert [len(rank.shown) for rank in made] == [100, 0, 0]


def test_a_board_that_does_not_answer_hides_nothing_and_is_asked_once(board: Board) -> None:
    board.reachable = False
    rank = Rank(2)
    with rank.held.beside(board):  # type: ignore[arg-type]
        rank.warn("one", "two", "three")
    assert rank.shown == ["one", "two", "three"] and board.asked == 1


@pytest.mark.parametrize("number", [0, 1])
def test_without_a_board_all_is_shown_once(number: int) -> None:
    rank = Rank(number)
    rank.warn("before")
    with rank.held.beside(None):
        rank.warn("meanwhile")
    rank.warn("after")
    rank.held.end()
    assert rank.shown == ["before", "meanwhile", "after"]
    assert rank.held.waiting.empty()


def test_a_start_that_fails_shows_what_waited() -> None:
    rank = Rank(1)
    rank.warn("before")
    rank.held.end()
    assert rank.shown == ["before"]
