"""The index: the same as a full parse, whatever happens to the file and to the index itself."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.runs import index
from launcher.runs.index import (
    BUCKETS,
    OURS,
    UNUSED_S,
    Series,
    Summary,
    cache_directory,
    index_file,
    prune,
    summarize,
)
from launcher.runs.records import Place, read_table
from tests.runs.made import append, lines, make_run, record, training


def plain(summary: Summary) -> dict[str, Any]:
    """A summary as values that can be compared."""
    series = {k: {**vars(s), "curve": s.curve.tolist()} for k, s in summary.series.items()}
    return {**vars(summary), "series": series}


def full(path: Path) -> dict[str, Any]:
    """Of all records at once."""
    summary = Summary()
    summary.add(read_table(path).in_order())
    return plain(summary)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text(lines(training(500)))
    return path


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From which offsets files were parsed."""
    offsets: list[int] = []
    read = index.read_chunks

    def watched(path: Path, start: Place) -> Any:
        offsets.append(start.end)
        return read(path, start)

    monkeypatch.setattr(index, "read_chunks", watched)
    return offsets


def test_summary(path: Path) -> None:
    summary = summarize(OURS, path)
    loss = summary.series["val/loss"]
    assert (loss.count, loss.last, loss.min, loss.max) == (10, (500, 0.4), (500, 0.4), (50, 4.0))
    assert summary.records == 60 and summary.first["step"] == 10 and summary.last["epoch"] == 10
    assert loss.curve[:, 1].tolist() == [200 / s for s in range(50, 501, 50)]
    assert plain(summary) == full(path)


def test_nulls_are_counted_and_are_no_extremes(path: Path) -> None:
    path.write_text(
        lines([record(1, a=2.0), record(2, a=None), record(3, a=1.0), record(4, a=None)])
    )
    series = summarize(OURS, path).series["a"]
    assert (series.count, series.nulls, series.last) == (2, 2, (4, None))
    assert (series.min, series.max) == ((3, 1.0), (1, 2.0))


def test_nothing_is_parsed_twice(path: Path, parsed: list[int]) -> None:
    first = plain(summarize(OURS, path))
    end = path.stat().st_size
    assert plain(summarize(OURS, path)) == first and parsed == [0]
    append(path, lines(training(1000)[60:]))
    assert plain(summarize(OURS, path)) == full(path)
    assert parsed == [0, end]


def test_a_torn_end_is_parsed_when_it_is_whole(path: Path, parsed: list[int]) -> None:
    summarize(OURS, path)
    end = path.stat().st_size
    text = lines([record(510, train__loss=0.5)])
    for part in (text[:20], text[20:-1], text[-1:]):
        append(path, part)
        assert plain(summarize(OURS, path)) == full(path)
    assert parsed == [0, end, end, end]
    assert summarize(OURS, path).series["train/loss"].last == (510, 0.5)


@pytest.mark.parametrize("regrown", [False, True])
def test_a_rewound_file_is_parsed_anew(regrown: bool, path: Path, parsed: list[int]) -> None:
    summarize(OURS, path)
    kept = path.read_text().splitlines(keepends=True)[:30]
    again = [{**one, "time": one["time"] + 1000} for one in training(700 if regrown else 300)[30:]]
    # In place, as a resume does it: the inode stays.
    path.write_text("".join(kept) + lines(again))
    assert plain(summarize(OURS, path)) == full(path)
    assert parsed == [0, 0]


def test_an_edit_that_keeps_the_size_is_seen(path: Path, parsed: list[int]) -> None:
    summarize(OURS, path)
    text = path.read_text()
    path.write_text(text.replace('"train/loss": 10.0,', '"train/loss": 99.0,', 1))
    os.utime(path, ns=(1, 1))
    assert plain(summarize(OURS, path)) == full(path)
    assert parsed == [0, 0]


def test_another_file_of_that_name_is_seen(path: Path) -> None:
    """One that differs only in the middle, and is longer."""
    path.write_text(lines(training(2000)))
    summarize(OURS, path)
    other = path.with_name("other")
    loss = '"train/loss": 0.1,'  # at step 1000
    other.write_text(path.read_text().replace(loss, '"train/loss": 9.9,'))
    append(other, lines([record(2010, train__loss=0.1)]))
    other.replace(path)
    assert plain(summarize(OURS, path)) == full(path)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other", "text", "version"])
def test_a_damaged_index_is_made_anew(damage: str, path: Path, cache: Path) -> None:
    expected = plain(summarize(OURS, path))
    (file,) = (cache / "launcher" / "runs").iterdir()
    data = file.read_bytes()
    other = make_run(path.parent.parent / "other") / "metrics.jsonl"
    summarize(OURS, other)
    flipped = bytearray(data)
    flipped[data.index(b"records") + 10] ^= 1
    contents = {"empty": b"", "cut": data[: len(data) // 2], "text": b"hello\nworld\n"}
    contents |= {"flipped": flipped, "other": index_file(other).read_bytes()}
    file.write_bytes(contents.get(damage, data))
    if damage == "version":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index, "VERSION", index.VERSION + 1)
            assert plain(summarize(OURS, path)) == expected
    assert plain(summarize(OURS, path)) == expected
    assert plain(summarize(OURS, path)) == expected


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
    assert plain(summarize(OURS, path)) == full(path)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "run"}


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert cache_directory() == Path("/home/somebody/.cache/launcher/runs")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path("/home/somebody/.cache/launcher/runs")


def test_unused_indexes_go(path: Path, cache: Path) -> None:
    summarize(OURS, path)
    old = cache / "launcher" / "runs" / "old"
    old.touch()
    os.utime(old, (time.time() - UNUSED_S - 60,) * 2)
    prune()
    assert [p.name for p in old.parent.iterdir()] == [index_file(path).name]


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
    assert vars(whole).keys() == vars(parts).keys()
    assert whole.curve.tolist() == parts.curve.tolist() and len(whole.curve) <= BUCKETS
    assert {**vars(whole), "curve": 0} == {**vars(parts), "curve": 0}
    finite = numbers[np.isfinite(numbers)]
    if len(finite):
        curve = whole.curve
        assert (curve[:, 1].min(), curve[:, 2].max()) == (finite.min(), finite.max())
        assert len(curve) == -(-len(finite) // whole.stride)
        for place, bucket in enumerate(
            np.split(finite, range(whole.stride, len(finite), whole.stride))
        ):
            assert curve[place, 1:].tolist() == [bucket.min(), bucket.max()]


AMOUNTS = {
    **{"append": st.integers(1, 40), "torn": st.integers(1, 60), "back": st.integers(1, 10)},
    **{"cut": st.floats(0, 1), "damaged": st.just(0), "empty": st.just(0)},
}
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
        elif kind == "empty":
            os.truncate(path, 0)
        with path.open("a") as file:
            if kind == "back":
                step = max(0, step - amount)
            for _ in range(amount if kind == "append" else kind == "back"):
                step, count = step + 1, count + 1
                one = record(step, a=count * 1.5, **({"b": None} if step % 7 == 0 else {}))
                # No two records are the same: their times are not.
                file.write(json.dumps({**one, "time": one["time"] + 0.001 * count}) + "\n")
            if kind == "torn":
                file.write(json.dumps(record(step + 1, a=0.5))[:amount])
            if kind == "damaged":
                file.write("}{ no record\n")
        found = summarize(OURS, path)
        assert plain(found) == full(path)
        assert plain(summarize(OURS, path)) == full(path)
