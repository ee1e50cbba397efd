"""The index: the same as a full parse, whatever happens to the file and to the index itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.runs import index
from launcher.runs.index import BUCKETS, OURS, UNUSED_S, Series, Summary, summarize
from launcher.runs.records import read_table
from tests.runs.made import append, lines, record, training

Parsed = Callable[[], list[int]]
RECORDS = training(500)
TEXT = lines(RECORDS)
OTHER = TEXT.replace('"train/loss": 0.4,', '"train/loss": 9.4,')  # in the middle
# What a resume at step 250 records, later than what it cut off.
AGAIN = [{**one, "time": one["time"] + 1000} for one in training(700)[30:]]


def values(series: Series) -> dict[str, Any]:
    """Such as can be compared."""
    return {**vars(series), "curve": series.curve.tolist()}


def plain(summary: Summary) -> dict[str, Any]:
    return {**vars(summary), "series": {k: values(s) for k, s in summary.series.items()}}


def summarized(path: Path) -> dict[str, Any]:
    return plain(summarize(OURS, path))


def full(path: Path) -> dict[str, Any]:
    """Of all records at once."""
    summary = Summary()
    summary.add(read_table(path).in_order())
    return plain(summary)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text(TEXT)
    return path


@pytest.fixture
def parsed() -> Iterator[Parsed]:
    """Tells from which offsets files were parsed."""
    with mock.patch.object(index, "read_chunks", wraps=index.read_chunks) as read:
        yield lambda: [start.end for (_, start), _ in read.call_args_list]


def test_summary(path: Path) -> None:
    """Nulls are counted, and are no extremes."""
    points = ((50, 2.0), (60, None), (100, 1.0), (110, None))
    path.write_text(lines([record(step, a=value) for step, value in points]))
    summary = summarize(OURS, path)
    assert (summary.records, summary.first["step"], summary.last["epoch"]) == (4, 50, 2)
    a = summary.series["a"]
    assert (a.count, a.nulls, a.last) == (2, 2, (110, None))
    assert (a.min, a.max, a.curve.tolist()) == ((100, 1), (50, 2), [[50, 2, 2], [100, 1, 1]])


def test_only_what_is_new_is_parsed(path: Path, parsed: Parsed) -> None:
    """Nothing where nothing is new; and a line that comes in parts when it is whole."""
    more, line = lines(training(1000)[60:]), lines([record(1010, train__loss=0.5)])
    for part in ("", "", more, line[:20], line[20:-1], line[-1:]):
        append(path, part)
        assert summarized(path) == full(path)
    once = len(TEXT) + len(more)
    assert parsed() == [0, len(TEXT), once, once, once]


@pytest.mark.parametrize(
    ("text", "in_place"),
    [
        pytest.param(lines(RECORDS[:30] + AGAIN[:6]), True, id="rewound"),
        pytest.param(lines(RECORDS[:30] + AGAIN), True, id="rewound and longer"),
        pytest.param(TEXT.replace('"train/loss": 10.0', '"train/loss": 99.0'), True, id="edited"),
        pytest.param(OTHER + lines([record(510, a=1.0)]), False, id="another longer one"),
    ],
)
def test_a_file_that_did_not_only_grow_is_parsed_anew(
    text: str, in_place: bool, path: Path, parsed: Parsed
) -> None:
    """A resume changes it in place: the inode stays."""
    summarize(OURS, path)
    new = path if in_place else path.with_name("new")
    new.write_text(text)
    os.utime(new, ns=(1, 1))
    new.replace(path)
    assert summarized(path) == full(path)
    assert parsed() == [0, 0]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "flipped": lambda data: data.replace(b'"records":60', b'"records":61'),
    "text": lambda data: b"hello\nworld\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_made_anew(damage: str, path: Path) -> None:
    expected, file = summarized(path), index.index_file(path)
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[damage](whole))
    assert file.read_bytes() != whole
    assert summarized(path) == expected and file.read_bytes() == whole


def test_another_version_has_an_index_of_its_own(path: Path) -> None:
    file = index.index_file(path)
    with mock.patch.object(index, "VERSION", index.VERSION + 1):
        assert index.index_file(path) != file


@pytest.mark.parametrize("place", ["a file", "no home"])
def test_without_a_place_for_it_the_file_is_parsed(
    place: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    if place == "no home":  # a container's user without an entry in /etc/passwd
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda text: text)
    assert summarized(path) == full(path)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "run"}


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert index.cache_directory() == Path("/home/somebody/.cache/launcher/runs")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert index.cache_directory() == Path("/home/somebody/.cache/launcher/runs")


def test_unused_indexes_go(path: Path, cache: Path) -> None:
    summarize(OURS, path)
    old = cache / "launcher" / "runs" / "old"
    old.touch()
    os.utime(old, (time.time() - UNUSED_S - 60,) * 2)
    index.prune()
    assert [p.name for p in old.parent.iterdir()] == [index.index_file(path).name]


@given(st.integers(0, 6 * BUCKETS), st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=60, deadline=None)
def test_a_series_does_not_depend_on_its_parts(count: int, seed: int, data: st.DataObject) -> None:
    """Also its curve, whose buckets grow as more comes."""
    random = np.random.default_rng(seed)
    numbers = np.where(random.random(count) < 0.1, np.nan, random.normal(size=count))
    steps = np.arange(count, dtype=float)
    cuts = data.draw(st.lists(st.integers(0, count), max_size=6))
    whole, parts = Series(), Series()
    whole.extend(steps, numbers)
    for part in np.split(np.arange(count), sorted(cuts)):
        parts.extend(steps[part], numbers[part])
    assert values(whole) == values(parts)
    finite = numbers[np.isfinite(numbers)]
    buckets = np.split(finite, range(whole.stride, len(finite), whole.stride))
    expected = [[part.min(), part.max()] for part in buckets if len(part)]
    assert whole.curve[:, 1:].tolist() == expected and len(expected) <= BUCKETS


AMOUNTS = {"append": st.integers(1, 40), "torn": st.integers(1, 60), "back": st.integers(1, 10)}
AMOUNTS |= {"cut": st.just(0) | st.floats(0, 1), "damaged": st.just(0)}
CHANGE = st.one_of(st.tuples(st.just(kind), amount) for kind, amount in AMOUNTS.items())


@given(st.lists(CHANGE, min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_index_is_the_full_parse_after_any_changes(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, Any]]
) -> None:
    """Appends, torn and damaged lines, cuts at any byte, steps that repeat, in any order."""
    folder = tmp_path_factory.mktemp("law")
    path, step, count = folder / "metrics.jsonl", 0, 0
    path.touch()
    for kind, amount in changes:
        if kind == "cut":
            os.truncate(path, int(amount * path.stat().st_size))
        elif kind == "torn":
            append(path, lines([record(step + 1, a=0.5)])[:amount])
        elif kind == "damaged":
            append(path, "}{ no record\n")
        elif kind == "back":
            step = max(0, step - amount)
        for _ in range({"append": amount, "back": 1}.get(kind, 0)):
            step, count = step + 1, count + 1
            one = record(step, a=count * 1.5, **({"b": None} if step % 7 == 0 else {}))
            one["time"] += 0.001 * count  # no two records are the same
            append(path, lines([one]))
        assert summarized(path) == full(path)
        assert summarized(path) == full(path)
