"""The recorder: weighted means over micro-batches, steps and ranks, in one record."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.runtime.cpu import CpuBudget
from launcher.runtime.process import Runtime
from launcher.runtime.topology import Topology
from launcher.telemetry.recorder import Recorder, Sink, _means

ALONE = Runtime(Topology(), torch.device("cpu"), CpuBudget(1, 1, 1, ""))
HERE = {"step": 3, "epoch": 1, "samples": 24}
law = settings(deadline=None, max_examples=50)
values = st.floats(-1e6, 1e6, width=32)
weighted = st.lists(st.tuples(values, st.floats(0.125, 100, width=32)), min_size=1, max_size=8)


class Kept(Sink):
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.flushed = True

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def flush(self) -> bool:
        return self.flushed


def recorder(sink: Kept | None = None) -> Recorder:
    return Recorder(ALONE, sink)


def add(to: Recorder, pairs: list[tuple[float, float]]) -> None:
    for value, weight in pairs:
        to.add({"loss": torch.tensor(value), "double": torch.tensor(2 * value)}, weight)


def mean(pairs: list[tuple[float, float]]) -> float:
    return math.fsum(v * w for v, w in pairs) / math.fsum(w for _, w in pairs)


@law
@given(weighted)
def test_means_are_weighted(pairs: list[tuple[float, float]]) -> None:
    sink = Kept()
    made = recorder(sink)
    add(made, pairs)
    made.add_step({"grad_norm": torch.tensor(4.0)})
    made.add_step({"grad_norm": torch.tensor(5.0)})
    made.record(HERE, {"train/lr": 0.1})
    (record,) = sink.records
    assert record["train/loss"] == pytest.approx(mean(pairs), rel=1e-9, abs=1e-6)
    assert record["train/double"] == pytest.approx(2 * mean(pairs), rel=1e-6, abs=1e-5)
    assert record["train/grad_norm"] == 4.5
    assert record["train/lr"] == 0.1
    assert {key: record[key] for key in HERE} == HERE and record["time"] > 1e9


def test_a_record_starts_the_means_anew() -> None:
    sink = Kept()
    made = recorder(sink)
    for value in (1.0, 5.0):
        add(made, [(value, 8)])
        made.record(HERE, {})
    made.record(HERE, {})
    assert [r.get("train/loss") for r in sink.records] == [1.0, 5.0, None]


def test_the_weight_may_be_a_tensor_on_the_device() -> None:
    sink = Kept()
    made = recorder(sink)
    made.add({"loss": torch.tensor(1.0, requires_grad=True)}, torch.tensor(3.0))
    made.add({"loss": torch.tensor(5.0)}, torch.tensor(1.0))
    made.record(HERE, {})
    assert sink.records[0]["train/loss"] == 2.0


def test_steps_with_different_values_have_means_of_their_own() -> None:
    sink = Kept()
    made = recorder(sink)
    made.add({"loss": torch.tensor(1.0)}, 1)
    made.add({"loss": torch.tensor(4.0), "extra": torch.tensor(7.0)}, 2)
    made.add({"extra": torch.tensor(1.0), "loss": torch.tensor(4.0)}, 1)
    made.record(HERE, {})
    assert sink.records[0]["train/loss"] == 13 / 4
    assert sink.records[0]["train/extra"] == 5


def test_integers_and_half_precision_are_summed_in_double() -> None:
    made = recorder()
    made.add({"n": torch.tensor(2**40), "x": torch.tensor(60_000, dtype=torch.float16)}, 3)
    made.add({"n": torch.tensor(2**40 + 1), "x": torch.tensor(60_000, dtype=torch.float16)}, 1)
    assert _means([made.state()])["n"] == 2**40 + 0.25
    assert 0 < _means([made.state()])["x"] == 59_968 or _means([made.state()])["x"] == 60_000


@law
@given(weighted, weighted)
def test_two_ranks_merge_into_the_mean_of_all(
    one: list[tuple[float, float]], two: list[tuple[float, float]]
) -> None:
    a, b = recorder(), recorder()
    add(a, one)
    add(b, two)
    merged = _means([a.state(), b.state()])
    assert merged["loss"] == pytest.approx(mean(one + two), rel=1e-9, abs=1e-6)


def test_a_rank_without_samples_adds_nothing() -> None:
    a = recorder()
    add(a, [(3.0, 2)])
    assert _means([{}, a.state(), {}]) == {"loss": 3.0, "double": 6.0}


@law
@given(weighted, weighted)
def test_state_goes_on_where_it_was_taken(
    before: list[tuple[float, float]], after: list[tuple[float, float]]
) -> None:
    """To the last bit: a resumed run's first record is that of the uninterrupted one."""
    whole, resumed = recorder(), recorder()
    add(whole, before)
    resumed.add_state(whole.state())
    assert resumed.state() == whole.state()
    for made in (whole, resumed):
        add(made, after)
    assert resumed.state() == whole.state()


def test_states_of_two_ranks_can_be_added_to_one() -> None:
    a, b, both = recorder(), recorder(), recorder()
    add(a, [(1.0, 1)])
    add(b, [(5.0, 3)])
    for made in (a, b):
        both.add_state(made.state())
    assert _means([both.state()]) == _means([a.state(), b.state()])


def test_flush_says_whether_all_is_written() -> None:
    sink = Kept()
    assert recorder(sink).flush() is True
    sink.flushed = False
    assert recorder(sink).flush() is False
    assert recorder().flush() is True  # another rank has nothing to write
