"""Records as columns, from files in any state."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.runs import records as module
from launcher.runs.records import TORN, Damage, Place, Table, read_chunks, read_objects, read_table
from tests.runs.made import START, lines, record

Points = list[tuple[float, float | None]]


def parse(text: str | bytes) -> Table:
    block = text.encode() if isinstance(text, str) else text
    return module.parse(block.splitlines(keepends=True))


def values(table: Table, key: str, x: str = "step") -> Points:
    at, found = table.series(key, x)
    known = [None if math.isnan(value) else value for value in found.tolist()]
    return list(zip(at.tolist(), known, strict=True))


def test_columns() -> None:
    """Null is NaN, and no other value is touched."""
    table = parse(lines([record(1, a=1.0, b=None), record(2, a=2.0, b=3.0), record(3, a=None)]))
    assert table.position["step"].tolist() == [1, 2, 3]
    assert table.position["samples"].tolist() == [64, 128, 192]
    assert table.columns.keys() == {"a", "b"} and table.damaged == []
    assert values(table, "a") == [(1, 1.0), (2, 2.0), (3, None)]
    assert values(table, "b", "time") == [(START + 1, None), (START + 2, 3.0)]
    assert values(table, "absent") == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"step": 2, "a": NaN}', "no JSON"),
        (b'{"step": 2, "a', "no JSON"),
        (b"\x00\x00\xff\xfe", "no JSON"),
        (b"[1, 2]", "not an object"),
        (b'{"a": 1.0}', "without a step"),
        (b'{"step": null, "a": 1.0}', "without a step"),
        (b'{"step": 1.5, "a": 1.0}', "without a step"),
        (b'{"step": 2, "a": 1.0}{"step": 3, "a": 1.0}', "no JSON"),
        # The lines before and after it are whole: together they would be valid JSON.
        (b'{"step": 2, "a": 1.0},{"step": 3, "a": 1.0}', "no JSON"),
        # Joined by a comma, as the fast way joins lines, the halves would be one record.
        (b'{"step": 2, "a": 1.0\n"b": 2.0}', "no JSON"),
    ],
)
def test_a_damaged_line_is_told_and_passed_over(line: bytes, reason: str) -> None:
    table = parse(b'{"step": 1, "a": 1.0}\n%b\n{"step": 4, "a": 4.0}\n' % line)
    assert values(table, "a") == [(1, 1.0), (4, 4.0)]
    assert [d.line for d in table.damaged] == [2, 3][: 1 + line.count(b"\n")]
    assert all(reason in damage.reason for damage in table.damaged)


def test_what_is_no_number_is_left_out() -> None:
    """Not even a text that looks like one."""
    block = b'{"step": 1, "a": 1.5, "note": "warm", "list": [1]}\n{"step": 2, "a": "2.5"}\n'
    for text in (block, block + b'{"step": 3, "a": true}\n'):
        table = parse(text)
        assert values(table, "a")[0] == (1, 1.5) and set(table.columns) == {"a"}
    assert values(table, "a") == [(1, 1.5), (3, 1.0)]
    assert parse(b'{"step": 2, "a": "2.5"}\n').columns == {}


@pytest.mark.parametrize("cut", [1, 5])
def test_a_last_line_that_is_not_ended_may_be_under_way(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines([record(1, a=1.0), record(2, a=2.0)])[:-cut])
    table = read_table(path)
    assert len(table) == 1 and table.damaged == [Damage(2, TORN)]


NUMBER = st.none() | st.floats(-1e6, 1e6) | st.integers(-9, 9)
RECORD = st.fixed_dictionaries({"step": st.integers(0, 50)}, optional=dict.fromkeys("abc", NUMBER))
LINE = st.one_of(
    RECORD.map(json.dumps),
    st.sampled_from(
        ["", "{", "}", '{"step": 1', '"a": 2}', "NaN", "[]", '{"step": 3},{"step": 4}']
    ),
    st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=12),
)


def one_by_one(text: list[str]) -> tuple[list[tuple[str, float, Any]], list[int]]:
    """The plainest reading of lines: what a record says, and the numbers of the other lines."""
    found, damaged = [], []
    for number, line in enumerate(text, 1):
        try:
            one = json.loads(line, parse_int=float, parse_constant=lambda name: 1 / 0)
        except (ValueError, ZeroDivisionError):
            one = None
        if isinstance(one, dict) and "step" in one:
            found += [(key, one["step"], one[key]) for key in "abc" if key in one]
        else:
            damaged.append(number)
    return found, damaged


@given(st.lists(LINE, max_size=12), st.integers(1, 80), st.integers(1, 5))
def test_any_file_is_read_as_line_by_line(
    tmp_path_factory: Any, text: list[str], size: int, together: int
) -> None:
    """In chunks of any size, of any number of blocks: joined they keep their rows apart."""
    path = tmp_path_factory.mktemp("any") / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOGETHER", together)
        chunks = list(read_chunks(path, Place(), size))
    table = Table.join([table for table, _ in chunks])
    assert [place.lines for _, place in chunks][-1:] == ([len(text)] if text else [])
    expected, damaged = one_by_one(text)
    found = [(key, *point) for key in table.columns for point in values(table, key)]
    assert sorted(found, key=repr) == sorted(expected, key=repr)
    assert [d.line for d in table.damaged] == damaged


def test_objects_of_a_history(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    assert read_objects(path) == ([], [])
    path.write_text('{"event": "start"}\n[]\n{"event": "fin')
    found, damaged = read_objects(path)
    assert found == [{"event": "start"}]
    assert damaged[0] == Damage(2, "not an object") and damaged[1].line == 3
