"""The recorder: weighted means over micro-batches, steps and ranks in one record; what a task shows
from rank 0, once a step."""

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launcher.engine.evaluate import means_of as mean_notes
from launcher.runtime.cpu import CpuBudget
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology
from launcher.tasks import Task, make_task
from launcher.tasks import recorder as for_tasks
from launcher.telemetry.media import OnHost
from launcher.telemetry.recorder import Recorder
from launcher.telemetry.writer import Writer
from tests.telemetry.helpers import exit_code, fork

ALONE = Runtime(Topology(), torch.device("cpu"), CpuBudget(1, 1, 1, ""))
law = settings(deadline=None, max_examples=50)
values = st.floats(-1e6, 1e6, width=32)
weights = st.floats(0.125, 100, width=32)
# What steps add: values by name, in any order, and their weight.
added = st.tuples(st.dictionaries(st.sampled_from("abc"), values, min_size=1), weights)
steps = st.lists(added, min_size=1, max_size=8)
Steps = list[tuple[dict[str, float], float]]


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


def with_sums(steps: Steps, recorder: Recorder | None = None) -> Recorder:
    recorder = recorder or recording()[0]
    for named, weight in steps:
        taken = {name: torch.tensor(value, requires_grad=True) for name, value in named.items()}
        recorder.add(taken, weight)
    return recorder


def means_of(steps: Steps) -> Any:
    expected = {}
    for name in {name for named, _ in steps for name in named}:
        pairs = [(named[name], weight) for named, weight in steps if name in named]
        total = math.fsum(weight for _, weight in pairs)
        expected[f"train/{name}"] = math.fsum(value * weight for value, weight in pairs) / total
    return pytest.approx(expected, rel=1e-9, abs=1e-6)


def found(recorder: Recorder) -> dict[str, float]:
    gathered = recorder.gather()
    assert gathered is not None
    return gathered[0]


@law
@given(steps)
@example([({"a": 1.0}, 1), ({"a": 4.0, "b": 7.0}, 2), ({"b": 1.0, "a": 4.0}, 1)])
def test_each_value_has_a_weighted_mean_of_its_own_and_starts_anew(steps: Steps) -> None:
    recorder = with_sums(steps)
    assert found(recorder) == means_of(steps)
    assert found(recorder) == {}


def test_a_record_has_the_present_progress() -> None:
    recorder, kept = recording(step=3)
    recorder.progress.samples = 24
    recorder.write({"val/loss": 0.5})
    (record,) = kept
    assert record.pop("time") > 1e9
    assert record == {"step": 3, "epoch": 0, "samples": 24, "val/loss": 0.5}


def test_what_is_local_to_a_rank_comes_with_the_means() -> None:
    assert with_sums([({"a": 2.0}, 1.0)]).gather(0.25) == ({"train/a": 2.0}, [0.25])


def test_integers_and_half_precision_are_summed_in_double() -> None:
    """The weight may be a tensor on the device."""
    recorder, half = recording()[0], torch.tensor(60_000, dtype=torch.float16)
    recorder.add({"n": torch.tensor(2**40), "x": half}, torch.tensor(3))
    recorder.add({"n": torch.tensor(2**40 + 1), "x": half}, 1)
    assert found(recorder) == {"train/n": 2**40 + 0.25, "train/x": half.item()}


@law
@given(steps, steps)
def test_two_ranks_merge_into_the_mean_of_all(one: Steps, two: Steps) -> None:
    both = recording()[0]
    for state in ({}, with_sums(one).sums.state(), with_sums(two).sums.state()):
        both.sums.merge(state)
    assert found(both) == means_of(one + two)


@law
@given(steps, steps)
def test_state_goes_on_where_it_was_taken(before: Steps, after: Steps) -> None:
    """To the last bit: a resumed run's first record is that of the uninterrupted one."""
    whole, resumed = with_sums(before), recording()[0]
    resumed.sums.merge(whole.sums.state())
    assert resumed.sums.state() == whole.sums.state()
    assert with_sums(after, resumed).sums.state() == with_sums(after, whole).sums.state()


@law
@given(steps, st.lists(st.booleans(), min_size=1, max_size=5), st.integers(1, 40))
def test_on_a_device_values_are_read_later_and_give_the_same(
    added: Steps, weighs: list[bool], times: int
) -> None:
    """Also over more than are kept apart, and where only some batches are weighed."""
    now, late = recording()[0], recording()[0]
    late.sums.device = torch.device("cpu")  # which is a device as any other
    for i, (named, weight) in enumerate(added * times):
        values = {name: torch.tensor(value, requires_grad=True) for name, value in named.items()}
        for recorder in (now, late):
            tensor = weighs[i % len(weighs)]
            recorder.add(values, torch.tensor(float(weight)) if tensor else float(weight))
        with torch.no_grad():  # the task goes on with its own
            for value in values.values():
                value += 1
    assert all(len(rows) <= 64 for rows, _ in late.sums._rows.values())
    assert late.sums.state() == now.sums.state()


def test_a_first_batch_of_weight_0_counts_for_nothing() -> None:
    assert found(with_sums([({"a": 3.0}, 0.0), ({"a": 5.0}, 2.0), ({"a": 9.0}, 0.0)])) == {
        "train/a": 5.0
    }
    assert found(with_sums([({"a": 3.0}, 0.0)])) == {}


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
    with pytest.raises(ValueError, match=told), recorder.evaluating("val"):
        recorder.scalar("gate", torch.ones(2))
    assert recorder.step == 5


def test_media_carry_the_step_under_way_and_the_phase() -> None:
    recorder, kept = recording(step=4)
    assert recorder.step == 5
    recorder.text("note", "training")
    recorder.image("picture", torch.rand(3, 4))
    recorder.histogram("spread", [1.0, 2.0])
    recorder.histogram("nothing", [])
    with recorder.evaluating("val"):
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
    with recorder.evaluating("val"):
        recorder.scalar("gate", torch.tensor(1.0), weight=2)
        first = recorder.take()
        recorder.scalar("gate", 4)
        recorder.scalar("other", 5)
        second = recorder.take()
    assert mean_notes([*first, *second]) == {"gate": 2.0, "other": 5.0}
    assert recorder.sums.state() == {}


def test_a_loader_worker_records_nothing_and_knows_no_step() -> None:
    """Forked or spawned. It fetches ahead: any step that it gave would be wrong."""
    recorder, kept = recording()

    def work(recorder: Any = recorder) -> int:
        recorder.scalar("gate", 1.0)
        recorder.text("note", "x")
        with pytest.raises(RuntimeError, match="not known in a loader worker"):
            print(recorder.step)
        return len(kept)

    assert work(pickle.loads(pickle.dumps(recorder))) == 0

    assert exit_code(fork(work)) == 0


def test_a_task_outside_of_a_run_can_call_it() -> None:
    recorder = Task.recorder
    recorder.scalar("a", 1)
    recorder.text("a", "")
    for show in (recorder.image, recorder.histogram, recorder.figure):
        show("a", None)
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
