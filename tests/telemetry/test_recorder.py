"""The recorder: weighted means over micro-batches, steps and ranks in one record; what a task shows
from rank 0, once a step."""

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.engine.evaluate import on_host
from launcher.runtime.cpu import CpuBudget
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology
from launcher.tasks import Task, make_task
from launcher.tasks import recorder as for_tasks
from launcher.telemetry.media import OnHost
from launcher.telemetry.recorder import Recorder, means
from launcher.telemetry.writer import Writer
from tests.telemetry.helpers import exit_code, fork

ALONE = Runtime(Topology(), torch.device("cpu"), CpuBudget(1, 1, 1, ""))
law = settings(deadline=None, max_examples=50)
values = st.floats(-1e6, 1e6, width=32)
weighted = st.lists(st.tuples(values, st.floats(0.125, 100, width=32)), min_size=1, max_size=8)
Pairs = list[tuple[float, float]]


class Kept(Writer):
    """Keeps what it takes; not open, it is that of another rank."""

    def __init__(self, is_open: bool) -> None:
        super().__init__()
        self.is_open, self.items = is_open, list[Any]()

    def _put(self, item: Any, limit: float) -> bool:
        self.items.append(item)
        return True


def recording(step: int = 4, is_main: bool = True) -> tuple[Recorder, list[Any]]:
    """A recorder after so many steps, and what it has written and shown."""
    kept = Kept(is_main)
    return Recorder(ALONE, Progress(step=step), kept), kept.items


def with_sums(pairs: Pairs, recorder: Recorder | None = None) -> Recorder:
    recorder = recorder or recording()[0]
    for value, weight in pairs:
        recorder.add({"loss": torch.tensor(value), "double": torch.tensor(2 * value)}, weight)
    return recorder


def mean(pairs: Pairs) -> float:
    return math.fsum(v * w for v, w in pairs) / math.fsum(w for _, w in pairs)


def found(recorder: Recorder) -> dict[str, float]:
    gathered = recorder.gather()
    assert gathered is not None
    return gathered[0]


@law
@given(weighted)
def test_means_are_weighted_and_start_anew(pairs: Pairs) -> None:
    recorder = with_sums(pairs)
    for norm in (4.0, 5.0):
        recorder.add({"grad_norm": torch.tensor(norm)}, 1.0)
    read = found(recorder)
    assert read["train/loss"] == pytest.approx(mean(pairs), rel=1e-9, abs=1e-6)
    assert read["train/double"] == pytest.approx(2 * mean(pairs), rel=1e-6, abs=1e-5)
    assert read["train/grad_norm"] == 4.5
    assert found(recorder) == {}


def test_a_record_has_the_present_progress() -> None:
    recorder, kept = recording(step=3)
    recorder.progress.samples = 24
    recorder.write({"val/loss": 0.5})
    (record,) = kept
    assert record.pop("time") > 1e9
    assert record == {"step": 3, "epoch": 0, "samples": 24, "val/loss": 0.5}


def test_what_is_local_to_a_rank_comes_with_the_means() -> None:
    assert with_sums([(1.0, 1.0)]).gather(0.25) == (
        {"train/loss": 1.0, "train/double": 2.0},
        [0.25],
    )


def test_steps_with_different_values_have_means_of_their_own() -> None:
    """The weight may be a tensor on the device."""
    recorder, _ = recording()
    recorder.add({"loss": torch.tensor(1.0, requires_grad=True)}, torch.tensor(1.0))
    recorder.add({"loss": torch.tensor(4.0), "extra": torch.tensor(7.0)}, torch.tensor(2.0))
    recorder.add({"extra": torch.tensor(1.0), "loss": torch.tensor(4.0)}, 1)
    assert found(recorder) == {"train/loss": 13 / 4, "train/extra": 5}


def test_integers_and_half_precision_are_summed_in_double() -> None:
    recorder, half = recording()[0], torch.tensor(60_000, dtype=torch.float16)
    recorder.add({"n": torch.tensor(2**40), "x": half}, 3)
    recorder.add({"n": torch.tensor(2**40 + 1), "x": half}, 1)
    assert found(recorder) == {"train/n": 2**40 + 0.25, "train/x": half.item()}


@law
@given(weighted, weighted)
def test_two_ranks_merge_into_the_mean_of_all(one: Pairs, two: Pairs) -> None:
    both = recording()[0]
    for state in ({}, with_sums(one).state(), with_sums(two).state()):
        both.add_state(state)
    assert found(both)["train/loss"] == pytest.approx(mean(one + two), rel=1e-9, abs=1e-6)


@law
@given(weighted, weighted)
def test_state_goes_on_where_it_was_taken(before: Pairs, after: Pairs) -> None:
    """To the last bit: a resumed run's first record is that of the uninterrupted one."""
    whole, resumed = with_sums(before), recording()[0]
    resumed.add_state(whole.state())
    assert resumed.state() == whole.state()
    assert with_sums(after, resumed).state() == with_sums(after, whole).state()


def test_scalars_of_a_task_are_weighted_means() -> None:
    recorder, _ = recording()
    recorder.scalar("gate", torch.tensor(2.0, requires_grad=True), weight=3)
    recorder.scalar("gate", 6, weight=1)
    recorder.scalar("other", 0.5)
    assert found(recorder) == {"train/gate": 3.0, "train/other": 0.5}


def test_what_is_no_scalar_is_refused_and_an_evaluation_that_fails_is_over() -> None:
    recorder, told = recording()[0], r"'gate' is no scalar: its shape is \(2,\)"
    with pytest.raises(ValueError, match=told):
        recorder.scalar("gate", torch.ones(2))
    with pytest.raises(ValueError, match=told), recorder.evaluating():
        recorder.scalar("gate", torch.ones(2))
    assert recorder.step == 5


def test_media_carry_the_step_under_way_and_the_phase() -> None:
    recorder, kept = recording(step=4)
    assert recorder.step == 5
    recorder.text("note", "training")
    recorder.image("picture", torch.rand(3, 4))
    recorder.histogram("spread", [1.0, 2.0])
    recorder.histogram("nothing", [])
    with recorder.evaluating():
        assert recorder.step == 4
        recorder.text("note", "evaluation")
    recorder.show_held()
    assert [(m.kind, m.names, m.step) for m in kept] == [
        ("text", ["train/note"], 5),
        ("image", ["train/picture"], 5),
        ("histogram", ["train/spread"], 5),
        ("text", ["val/note"], 4),
    ]


def test_a_name_stands_once_a_step() -> None:
    """Micro-batches call train_step several times, and a step that the scaler skips comes again."""
    recorder, kept = recording()
    for step in (4, 4, 5):
        recorder.progress.step = step
        for text in ("first", "second"):
            recorder.text("note", text)
    assert [(m.value, m.step) for m in kept] == [("first", 5), ("first", 6)]


def test_other_ranks_show_and_write_nothing() -> None:
    recorder, kept = recording(is_main=False)
    recorder.text("note", "x")
    recorder.image("picture", torch.rand(3, 4))
    recorder.figure("figure", object())  # not even drawn
    recorder.write({"x": 1.0})
    assert kept == []


def test_a_figure_is_drawn_at_once() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    recorder, kept = recording()
    figure = figures.Figure(figsize=(2, 1), dpi=50, facecolor="red")
    recorder.figure("figure", figure)
    figure.set_facecolor("blue")
    (media,) = kept
    assert isinstance(media.value, OnHost) and media.kind == "image"
    pixels = media.value.read()
    assert pixels.shape == (1, 3, 50, 100)
    assert (pixels[0] == [[[255]], [[0]], [[0]]]).all()


def test_scalars_of_an_evaluation_are_means_in_the_order_of_its_batches() -> None:
    recorder, _ = recording()
    with recorder.evaluating():
        recorder.scalar("gate", torch.tensor(1.0), weight=2)
        first = recorder.take()
        recorder.scalar("gate", 4)
        recorder.scalar("other", 5)
        second = recorder.take()
    assert means(on_host([*first, *second])) == {"gate": 2.0, "other": 5.0}
    assert recorder.state() == {}


def test_a_loader_worker_records_nothing() -> None:
    """Forked or spawned."""
    recorder, kept = recording()
    assert type(pickle.loads(pickle.dumps(recorder))) is for_tasks.Recorder

    def work() -> int:
        recorder.scalar("gate", 1.0)
        recorder.text("note", "x")
        return len(kept) + len(recorder.state())

    assert exit_code(fork(work)) == 0


def test_a_task_outside_of_a_run_can_call_it() -> None:
    recorder = Task.recorder
    recorder.scalar("a", 1)
    recorder.image("a", None)
    recorder.histogram("a", None)
    recorder.text("a", "")
    recorder.figure("a", None)
    assert recorder.step == 0


class Early(Task):
    def __init__(self, cfg: object) -> None:
        self.cfg = cfg
        self.recorder.scalar("early", 1.0)


class Chosen(Early):
    def __new__(cls, cfg: object) -> "Chosen":
        assert cfg == "config"
        return super().__new__(cls)


@pytest.mark.parametrize("kind", [Early, Chosen])
def test_a_task_has_its_recorder_when_it_is_made(kind: type) -> None:
    recorder, _ = recording()
    task = make_task(kind, "config", recorder)  # type: ignore[arg-type]
    assert (task.recorder, task.cfg) == (recorder, "config")
    assert found(recorder) == {"train/early": 1.0}
    assert type(Task.recorder) is for_tasks.Recorder
