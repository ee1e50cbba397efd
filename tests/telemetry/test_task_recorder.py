"""What a task records: scalars with the records of all ranks, the rest from rank 0, once a step."""

import os
import pickle
from typing import Any

import pytest
import torch

from launcher import Task
from launcher.runtime.cpu import CpuBudget
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology
from launcher.tasks.recorder import TaskRecorder
from launcher.telemetry.media import Media, OnHost
from launcher.telemetry.recorder import Recorder, Sink, _means, means
from launcher.telemetry.task_recorder import RunRecorder, on_host

ALONE = Runtime(Topology(), torch.device("cpu"), CpuBudget(1, 1, 1, ""))


class Kept(Sink):
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.media: list[Media] = []

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def show(self, media: Media) -> None:
        self.media.append(media)


def run(step: int = 4, is_main: bool = True) -> tuple[RunRecorder, Kept]:
    kept = Kept()
    recorder = Recorder(ALONE, kept if is_main else None)
    return RunRecorder(recorder, Progress(step=step), ALONE), kept


def test_scalars_of_the_training_are_weighted_means() -> None:
    task, kept = run()
    task.scalar("gate", torch.tensor(2.0, requires_grad=True), weight=3)
    task.scalar("gate", 6, weight=1)
    task.scalar("other", 0.5)
    task.recorder.record({"step": 5, "epoch": 0, "samples": 0}, {})
    (record,) = kept.records
    assert record["train/gate"] == 3.0 and record["train/other"] == 0.5


def test_ranks_are_put_together_and_a_checkpoint_keeps_the_sums() -> None:
    (one, _), (two, _) = run(), run(is_main=False)
    one.scalar("gate", 1.0)
    two.scalar("gate", 4.0, weight=2)
    two.scalar("of one rank", 7)
    resumed = Recorder(ALONE)
    resumed.add_state(two.recorder.state())
    found = _means([one.recorder.state(), resumed.state()])
    assert found == {"gate": 3.0, "of one rank": 7.0}


def test_what_is_no_scalar_is_refused() -> None:
    task, told = run()[0], r"'gate' is no scalar: its shape is \(2,\)"
    with pytest.raises(ValueError, match=told):
        task.scalar("gate", torch.ones(2))
    with pytest.raises(ValueError, match=told), task.evaluating():
        task.scalar("gate", torch.ones(2))


def test_media_carry_the_step_under_way_and_the_phase() -> None:
    task, kept = run(step=4)
    assert task.step == 5
    task.text("note", "training")
    task.image("picture", torch.rand(3, 4))
    task.histogram("spread", [1.0, 2.0])
    task.histogram("nothing", [])
    with task.evaluating():
        assert task.step == 4
        task.text("note", "evaluation")
    task.show_held()
    found = [(m.kind, m.names, m.step) for m in kept.media]
    assert found == [
        ("text", ["train/note"], 5),
        ("image", ["train/picture"], 5),
        ("histogram", ["train/spread"], 5),
        ("text", ["val/note"], 4),
    ]


def test_a_name_stands_once_a_step() -> None:
    """Micro-batches call train_step several times, and a step that the scaler skips comes again."""
    task, kept = run()
    for step in (4, 4, 5):
        task.progress.step = step
        for text in ("first", "second"):
            task.text("note", text)
    assert [(m.value, m.step) for m in kept.media] == [("first", 5), ("first", 6)]


def test_other_ranks_show_nothing() -> None:
    task, kept = run(is_main=False)
    task.text("note", "x")
    task.image("picture", torch.rand(3, 4))
    task.figure("figure", object())  # not even drawn
    assert kept.media == []


def test_a_figure_is_drawn_at_once() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    task, kept = run()
    figure = figures.Figure(figsize=(2, 1), dpi=50)
    figure.add_axes((0, 0, 1, 1), facecolor="red").set_axis_on()
    task.figure("figure", figure)
    figure.clear()
    (media,) = kept.media
    assert isinstance(media.value, OnHost) and media.kind == "image"
    pixels = media.value.read()
    assert pixels.shape == (1, 3, 50, 100) and (pixels[0, 0] > 200).mean() > 0.5
    assert (pixels[0, 1] < 50).mean() > 0.5


def test_scalars_of_an_evaluation_are_means_in_the_order_of_its_batches() -> None:
    task, _ = run()
    with task.evaluating():
        task.scalar("gate", torch.tensor(1.0), weight=2)
        first = task.take()
        task.scalar("gate", 4)
        task.scalar("other", 5)
        second = task.take()
    found = means(on_host([*first, *second]))
    assert found == {"gate": 2.0, "other": 5.0}
    assert task.recorder.state() == {}


def test_an_evaluation_that_fails_is_over() -> None:
    task, _ = run()
    with pytest.raises(RuntimeError), task.evaluating():
        raise RuntimeError
    assert task.step == 5


def test_a_loader_worker_records_nothing() -> None:
    """Forked or spawned."""
    task, kept = run()
    sent = pickle.loads(pickle.dumps(task))
    assert type(sent) is TaskRecorder
    child = os.fork()
    if child == 0:
        task.scalar("gate", 1.0)
        task.text("note", "x")
        os._exit(len(kept.media) + len(task.recorder.state()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_task_outside_of_a_run_can_call_it() -> None:
    recorder = Task.recorder
    recorder.scalar("a", 1)
    recorder.image("a", None)
    recorder.histogram("a", None)
    recorder.text("a", "")
    recorder.figure("a", None)
    assert recorder.step == 0
