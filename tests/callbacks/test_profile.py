"""Traces of single steps, and the tables of where a step's time goes."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from launcher.callbacks.memory_history import MemoryHistory
from launcher.callbacks.profile import Profile
from launcher.callbacks.step_parts import PARTS, StepParts
from launcher.data.plan import Plan
from tests.callbacks.helpers import CPU, view
from tests.callbacks.profiled import LATE, SLEEPS
from tests.system import jobs

TASK = Path(__file__).with_name("profiled.py")
ARGS = (
    *("TASK.NAME", f"{TASK}:Profiled", "CALLBACKS", f"['{TASK}:Clock']", "EVAL.SPLITS", "[]"),
    *("TRAIN.DURATION", "6step", "LOG.EVERY", "3step", "LOG.TENSORBOARD", "False"),
    *("DATALOADER.NUM_WORKERS", "0", "TRAIN.MICRO_BATCH_SIZE", "4", "CHECKPOINT.KEEP_BEST", "0"),
)
# As TensorBoard's profile plugin takes a file's name apart (torch_tb_profiler/consts.py).
WORKER = re.compile(r"^(.*?)(\.\d+)?\.pt\.trace\.json(?:\.gz)?$")


def table(file: Path) -> tuple[int, float, dict[str, float]]:
    """The step that a table is of, its milliseconds, and those of the parts."""
    head, *rows = file.read_text().splitlines()
    found = re.match(r"step (\d+) of rank \d+: ([\d.]+) ms", head)
    assert found is not None
    names = {words: part for part, words in PARTS.items()}
    cut = [re.match(r"  ([a-z ]+?) +([\d.]+) ms +[\d.]+ %", row) for row in rows]
    return int(found[1]), float(found[2]), {names[row[1]]: float(row[2]) for row in cut if row}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return jobs.state(run)["model"]


@pytest.mark.parametrize(
    ("ranks", "phases"),
    [(1, True), *(jobs.slow(*row) for row in ((1, False), (2, False), (2, True)))],
)
def test_the_parts_are_where_the_time_went(ranks: int, phases: bool, tmp_path: Path) -> None:
    """Two micro-batches a rank. Their sum is what another clock found, rank 0 waits for rank 1 in
    the exchange alone, and the weights are those of a run without profile."""
    plain, run = tmp_path / "plain", tmp_path / "run"
    args = ["train", *ARGS, "TRAIN.BATCH_SIZE", str(8 * ranks), "TASK.PHASES", str(phases)]
    for more in (["OUTPUT_DIR", run, "DEBUG.PROFILE", "3step"], ["OUTPUT_DIR", plain]):
        started = jobs.Group([*args, *more], ranks) if ranks > 1 else jobs.Forked([*args, *more])
        with started as job:
            job.wait().ok()
    assert not (plain / "profile").exists()
    mine, theirs = weights(run), weights(plain)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    for rank in range(ranks):
        clock = json.loads((run / f"clock{rank}.json").read_text())
        for traced in (3, 6):
            step, whole, parts = table(run / f"profile/step_{traced}/rank{rank}.txt")
            assert step == traced - 1 and parts.keys() == PARTS.keys()
            assert sum(parts.values()) == pytest.approx(whole, abs=0.01)
            assert whole == pytest.approx(clock[str(step)], rel=0.1)
            passes, updates = 2 * (1 + phases), 1 + phases
            assert parts["data"] >= 1e3 * SLEEPS["data"] * 8
            assert parts["forward"] >= 1e3 * (SLEEPS["forward"] + LATE * rank) * passes
            assert parts["backward"] >= 1e3 * SLEEPS["backward"] * passes
            assert parts["optimiser"] >= 1e3 * SLEEPS["optimiser"] * updates
            assert parts["record"] == 0  # made in the next step
            if (ranks, rank) == (2, 0):
                assert parts["exchange"] > 1e3 * LATE * passes / 2
                assert parts["exchange"] > parts["forward"]
            else:
                assert parts["exchange"] < parts["backward"]
    if ranks == 1:
        assert "the record of step 3 took" in (run / "profile/step_3/rank0.txt").read_text()


def test_a_trace_is_one_of_that_step_and_there_are_only_so_many(tmp_path: Path) -> None:
    run, args = tmp_path / "run", ("TRAIN.BATCH_SIZE", "4", "DEBUG.PROFILE", "1step")
    jobs.train(*ARGS, *args, "DEBUG.PROFILE_STEPS", "2", "OUTPUT_DIR", run).ok()
    files = sorted(path.relative_to(run / "profile") for path in run.glob("profile/*/*"))
    names = ("rank0.pt.trace.json", "rank0.txt")
    assert files == [Path(f"step_{step}/{name}") for step in (1, 2) for name in names]
    worker = WORKER.match("rank0.pt.trace.json")
    assert worker is not None and worker[1] == "rank0"
    events = json.loads((run / "profile/step_2/rank0.pt.trace.json").read_text())["traceEvents"]
    named = {event.get("name") for event in events}
    assert "ProfilerStep#2" in named and "ProfilerStep#1" not in named
    assert "aten::linear" in named and any("train_step" in str(name) for name in named)
    assert any("Input Dims" in event.get("args", {}) for event in events)
    # Each step is traced, so none can be measured without a trace.
    assert "slowed by its trace" in (run / "profile/step_2/rank0.txt").read_text()


def profiling(tmp_path: Path, period: str = "2step", device: torch.device = CPU) -> Profile:
    """A callback of a run without a loop; batches of one."""
    model = nn.Linear(2, 1)
    run = view(model=model, device=device, directory=tmp_path, plan=Plan(64, 1))
    run.cfg.DEBUG.PROFILE = period
    run.data.enter = lambda phase: None
    run.optimizers.update({"": torch.optim.SGD(model.parameters(), 0.1)})
    task = SimpleNamespace(train_step=lambda model, batch: model(batch).sum())
    object.__setattr__(run, "task", task)
    return Profile(run)


def step(profile: Profile, skipped: bool = False) -> None:
    """One step of what the callback sees of one."""
    run = profile.run
    profile.before_step(1)
    run.data.enter("data")
    batch = torch.ones(1, 2).to(run.runtime.device)
    run.data.enter("step")
    loss = run.task.train_step(run.model, batch)
    profile.on_backward(loss)
    loss.backward()
    profile.on_gradients()
    if not skipped:
        run.optimizers[""].step()
    run.progress.advance(1, 64, skipped)
    if not skipped:
        profile.on_step()


def test_a_step_that_the_scaler_skips_is_none(tmp_path: Path) -> None:
    profile = profiling(tmp_path)
    for skipped in (False, True, False, True, False, False):
        step(profile, skipped)
    profile.on_end()
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["step_2", "step_4"]
    # The one before step 2 was measured; that it was taken twice changes nothing.
    assert table(tmp_path / "profile/step_2/rank0.txt")[0] == 1
    assert profile.left == 1


def test_nothing_is_left_in_other_steps(tmp_path: Path) -> None:
    profile = profiling(tmp_path)
    run = profile.run
    optimizer = run.optimizers[""]

    def hooked() -> list[Any]:
        return [run.data.enter, run.task.train_step, optimizer.__dict__.get("step")]

    before = hooked()
    profile.before_step(1)
    assert all(now is not then for now, then in zip(hooked(), before, strict=True))
    profile = profiling(tmp_path)
    run, optimizer = profile.run, profile.run.optimizers[""]
    before = hooked()
    for _ in range(2):
        step(profile)
        assert hooked() == before


def test_a_task_and_an_optimiser_of_any_make(tmp_path: Path) -> None:
    """A frozen data class, a method of the object's own, and one whose attributes are fixed."""

    @dataclasses.dataclass(frozen=True)
    class Task:
        train_step: Any = None

    class Fixed:
        __slots__ = ()

        def step(self) -> None: ...

    profile = profiling(tmp_path)
    mine = lambda model, batch: model(batch).sum()  # noqa: E731
    object.__setattr__(profile.run, "task", Task(mine))
    profile.run.optimizers[""] = Fixed()  # type: ignore[assignment]
    for _ in range(2):
        step(profile)
    profile.on_end()
    assert profile.run.task.train_step is mine
    assert table(tmp_path / "profile/step_2/rank0.txt")[0] == 1


def test_a_full_disk_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("in the way")
    profile = profiling(tmp_path)
    step(profile)
    step(profile)
    profile.on_end()
    assert "no trace of step 2" in caplog.text and "could not be written" in caplog.text


class Event:
    """One of CUDA's, on a device whose time is what the test says."""

    time, streams = 0.0, list[Any]()

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        self.at = Event.time
        Event.streams.append(stream)

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_on_cuda_it_is_the_time_of_the_trainings_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "training")
    profile, moved = profiling(tmp_path), torch.device("cpu")
    profile.run.runtime.__dict__["device"] = SimpleNamespace(type="cuda")
    parts = StepParts(profile.run)
    parts.device = moved  # to which tensors can be moved here
    for now, part in enumerate(("data", "to", "step")):
        Event.time = 10.0 * now + 1
        if part == "to":
            torch.ones(1).to(moved)
            Event.time += 5
            torch.ones(1).to(moved)  # the batch's second tensor
        else:
            profile.run.data.enter(part)
    Event.time, weight = 25.0, torch.ones(1, requires_grad=True)
    queue = torch.autograd.Variable._execution_engine.queue_callback

    def reduce(_: torch.Tensor) -> None:
        """As DDP's: when the last gradient is there, it asks for a call at the end of the pass."""
        Event.time = 32.0
        queue(lambda: setattr(Event, "time", 35.0))

    weight.register_hook(reduce)
    loss = (weight * 2).sum()
    parts.on_backward(loss)
    loss.backward()
    Event.time = 40.0
    parts.mark("optimiser")
    profile.run.optimizers[""].step()
    Event.time = 42.0
    parts.end()
    found = {part: ms for part, ms in parts.milliseconds().items() if ms}
    assert found == {
        **{"data": 10.0, "copy": 10.0, "forward": 4.0, "backward": 7.0, "exchange": 3.0},
        "other": 1.0 + 5.0 + 2.0,
    }
    assert set(Event.streams) == {"training"}


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    profile = profiling(tmp_path, device=device)
    profile.run.model.to(device)
    for _ in range(2):
        step(profile)
    profile.on_end()
    number, whole, parts = table(tmp_path / "profile/step_2/rank0.txt")
    assert number == 1 and sum(parts.values()) == pytest.approx(whole, rel=0.1)
    trace = (tmp_path / "profile/step_2/rank0.pt.trace.json").read_text()
    assert '"cat": "kernel"' in trace


def recording(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, list[Any]]:
    """What is given to torch as the observer, and how its history was switched."""
    given: list[Any] = []
    switched: list[Any] = []
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", given.append, False)
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **how: switched.append(how)
    )
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda name: Path(name).write_text("x")
    )
    history = MemoryHistory(view(device=torch.device("cuda", 0), directory=tmp_path))
    history.on_end()
    return given[0], switched


def test_what_took_the_memory_is_written_down_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ran_out, switched = recording(monkeypatch, tmp_path)
    assert [how.get("enabled", "on") for how in switched] == ["on", None]
    ran_out(0, 3 << 30, 4 << 30, 1 << 30)
    file = tmp_path / "profile/memory_rank0.pickle"
    assert file.read_text() == "x"
    assert "3.00 GiB were asked for" in caplog.text and str(file) in caplog.text


def test_what_cannot_be_written_down_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ran_out, _ = recording(monkeypatch, tmp_path)
    (tmp_path / "profile").write_text("in the way")
    ran_out(0, 3 << 30, 4 << 30, 1 << 30)
    assert "could not be written down" in caplog.text


def test_no_gpu_has_no_history(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    MemoryHistory(view(directory=tmp_path)).on_end()
    (told,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "the device is no GPU" in told.getMessage()


@pytest.mark.gpu
def test_a_gpu_that_runs_out_of_memory(tmp_path: Path) -> None:
    history = MemoryHistory(view(device=torch.device("cuda", 0), directory=tmp_path))
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 50, device="cuda")
    history.on_end()
    assert (tmp_path / "profile/memory_rank0.pickle").stat().st_size > 0
