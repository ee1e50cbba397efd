"""Records as columns, from files in any state."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.runs import records as module
from launcher.runs.records import (
    TORN,
    Damage,
    Place,
    Table,
    read_chunks,
    read_objects,
    read_table,
)
from tests.runs.made import lines, record, training


def parse(block: bytes) -> Table:
    return module.parse(block.splitlines(keepends=True))


def values(table: Table, key: str) -> list[tuple[float, float | None]]:
    steps, found = table.series(key)
    return [
        (s, None if math.isnan(v) else v)
        for s, v in zip(steps.tolist(), found.tolist(), strict=True)
    ]


def test_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(training(50, 25)))
    table = read_table(path)
    assert table.position["step"].tolist() == [25, 50, 50]
    assert table.position["samples"].tolist() == [1600, 3200, 3200]
    assert values(table, "train/loss") == [(25, 4.0), (50, 2.0)]
    assert values(table, "val/accuracy") == [(50, 0.8)]
    assert values(table, "absent") == [] and table.damaged == []
    assert table.series("val/loss", "time")[0].tolist() == [1_700_000_050.0]


def test_null_is_nan_and_no_other_value_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines([record(1, a=1.0, b=None), record(2, a=2.0, b=3.0), record(3, a=None)]))
    table = read_table(path)
    assert values(table, "a") == [(1, 1.0), (2, 2.0), (3, None)]
    assert values(table, "b") == [(1, None), (2, 3.0)]
    assert "nonfinite" not in table.columns


def test_of_repeated_steps_the_later_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines([record(s, a=v) for s, v in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 9.0))]))
    assert values(read_table(path).in_order(), "a") == [(1, 1.0), (2, 9.0), (3, 3.0)]


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
    ],
)
def test_a_damaged_line_is_told_and_passed_over(line: bytes, reason: str) -> None:
    block = lines([record(1, a=1.0)]).encode() + line + b"\n" + lines([record(4, a=4.0)]).encode()
    table = parse(block)
    assert values(table, "a") == [(1, 1.0), (4, 4.0)]
    assert [d.line for d in table.damaged] == [2] and reason in table.damaged[0].reason


def test_a_line_torn_in_two_is_no_record() -> None:
    """Joined by a comma, as the fast way joins lines, the halves would be one."""
    table = parse(b'{"step": 1, "a": 1.0\n"b": 2.0}\n')
    assert len(table) == 0 and [d.line for d in table.damaged] == [1, 2]


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


LINE = st.one_of(
    st.builds(
        lambda step, keys: json.dumps({"step": step, **keys}),
        st.integers(0, 50),
        st.dictionaries(
            st.sampled_from("abc"),
            st.none() | st.floats(-1e6, 1e6) | st.integers(-9, 9),
            max_size=3,
        ),
    ),
    st.sampled_from(
        ["", "{", "}", '{"step": 1', '"a": 2}', "NaN", "[]", '{"step": 3},{"step": 4}']
    ),
    st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=12),
)


def one_by_one(text: str) -> tuple[list[tuple[str, int, Any]], list[int]]:
    """The plainest reading of a file: what a record says, and the numbers of the other lines."""
    found, damaged = [], []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            one = json.loads(line, parse_constant=lambda name: 1 / 0)
        except (ValueError, ZeroDivisionError):
            damaged.append(number)
            continue
        if isinstance(one, dict) and type(one.get("step")) is int:
            found += [(k, one["step"], v) for k, v in one.items() if k in "abc"]
        else:
            damaged.append(number)
    return found, damaged


@given(st.lists(LINE, max_size=12), st.integers(1, 80), st.integers(1, 5))
def test_any_file_is_read_as_line_by_line(
    tmp_path_factory: Any, text: list[str], size: int, together: int
) -> None:
    path = tmp_path_factory.mktemp("any") / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOGETHER", together)
        chunks = list(read_chunks(path, Place(), size))
    table = Table.join([table for table, _ in chunks])
    assert [place.lines for _, place in chunks][-1:] == ([len(text)] if text else [])
    expected, damaged = one_by_one("".join(f"{line}\n" for line in text))
    found = []
    for key, (rows, numbers) in table.columns.items():
        for row, number in zip(rows, numbers.tolist(), strict=True):
            step = int(table.position["step"][row])
            found.append((key, step, None if math.isnan(number) else number))
    wanted = [(k, s, None if v is None else float(v)) for k, s, v in expected]
    assert sorted(found, key=repr) == sorted(wanted, key=repr)
    assert [d.line for d in table.damaged] == damaged


def test_join_keeps_rows_apart() -> None:
    tables = [parse(lines([record(s, a=float(s))]).encode()) for s in (1, 2)]
    joined = Table.join([*tables, Table.join([])])
    assert joined.columns["a"][0].tolist() == [0, 1] and len(joined) == 2
    assert np.array_equal(joined.columns["a"][1], [1.0, 2.0])


def test_objects_of_a_history(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    assert read_objects(path) == ([], [])
    path.write_text('{"event": "start"}\n[]\n{"event": "fin')
    found, damaged = read_objects(path)
    assert found == [{"event": "start"}]
    assert damaged[0] == Damage(2, "not an object") and damaged[1].line == 3
