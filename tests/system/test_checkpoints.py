"""What checkpoints promise over whole runs. One-process runs start from a server that has torch
imported already, so that each costs a second."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from launcher.checkpoint.weights import match, read_weights
from tests.system import jobs
from tests.system.exact import COMMON, assert_same, records
from tests.system.exact_task import Exact

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.utils.tensorboard", "launcher.engine.run"])
ARGS = ["train", *COMMON, "DATALOADER.NUM_WORKERS", "0"]
STEPS = 28  # of the whole run
DIES_AT, SAVED = 19, 16  # the interrupted run; it has recorded step 18 by then
THIS = Path(__file__)


class Process:
    """`launcher ARGS` in a process of its own; at step `at` it is killed, or stays for good."""

    def __init__(
        self, folder: Path, args: tuple[object, ...], env: dict[str, str], at: int, die: bool
    ) -> None:
        self.args = [str(arg) for arg in args]
        self.files = (folder / "out", folder / "err")
        self.began = time.monotonic()
        parts = (self.args, env, [str(file) for file in self.files], at, die)
        self.process = SERVER.Process(target=_main, args=parts)
        self.process.start()
        self.pid = self.process.pid

    def wait(self, timeout: float = 90) -> jobs.Ended:
        self.process.join(timeout)
        if self.process.is_alive():
            self.kill()
            raise AssertionError(f"{self.args} ran longer than {timeout} s: {self.output()}")
        code = self.process.exitcode
        return jobs.Ended(self.args, code, *self.output(), time.monotonic() - self.began)

    def output(self) -> tuple[str, str]:
        texts = [file.read_text(errors="replace") if file.exists() else "" for file in self.files]
        return texts[0], texts[1]

    def kill(self) -> None:
        self.process.kill()
        self.process.join(30)


def _main(args: list[str], env: dict[str, str], files: list[str], at: int, die: bool) -> None:
    for number, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    clean = jobs.clean_environment(env)
    os.environ.clear()
    os.environ.update(clean)
    os.chdir(jobs.ROOT)
    sys.argv = ["launcher", *args]
    if at:
        _end_at(at, die)
    from launcher.cli import main

    code = main(args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_at(step: int, die: bool) -> None:
    from launcher.runtime.progress import Progress

    advance = Progress.advance

    def ending(self: Any, *args: Any) -> None:
        advance(self, *args)
        if self.step == step:
            time.sleep(0.7)  # what was saved before has time to be committed
            if die:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)

    Progress.advance = ending


Run = Callable[..., jobs.Ended]


@pytest.fixture
def begin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Process]]:
    """Start a command; whatever is still alive at the end of the test is killed."""
    started: list[Process] = []

    def begin(*args: object, at: int = 0, die: bool = True, **env: str) -> Process:
        folder = tmp_path_factory.mktemp("output")
        started.append(Process(folder, args, env, at, die))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


@pytest.fixture
def call(begin: Callable[..., Process]) -> Run:
    """Run a command to its end."""
    return lambda *args, **options: begin(*args, **options).wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    Process(folder, (*ARGS, "OUTPUT_DIR", folder / "run"), {}, 0, False).wait().ok()
    return folder / "run"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed at step 19. Not to be changed."""
    folder = tmp_path_factory.mktemp("half")
    ended = Process(folder, (*ARGS, "OUTPUT_DIR", folder / "run"), {}, DIES_AT, True).wait()
    assert ended.code == -signal.SIGKILL, ended.output
    assert max(jobs.checkpoint_steps(folder / "run")) == SAVED
    return folder / "run"


@pytest.fixture
def run(half: Path, tmp_path: Path) -> Path:
    """A copy of the killed run."""
    return Path(shutil.copytree(half, tmp_path / "run", symlinks=True))


def damage(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "state.pt").write_bytes(content)


def contents(run: Path) -> dict[str, tuple[int, int, int]]:
    """A snapshot of a run directory without the claim, which says who looked last."""
    return {k: v for k, v in jobs.snapshot(run).items() if k not in (".", ".lock")}


def assert_once(run: Path) -> None:
    """Assert that each (key, step) stands once in metrics.jsonl."""
    position = ("step", "epoch", "samples", "time")
    keys = [(k, r["step"]) for r in jobs.metrics(run) for k in r if k not in position]
    assert len(keys) == len(set(keys))


# Finding


def test_a_damaged_newest_is_passed_over(run: Path, whole: Path, call: Run) -> None:
    """Invariant 5: it is named in log and history, and the run ends exactly all the same."""
    *_, older, newest = jobs.checkpoint_steps(run)
    damage(run / "checkpoints" / f"step_{newest}")
    call(*ARGS, "--resume", "OUTPUT_DIR", run).ok()
    log = (run / "logs/rank0.log").read_text()
    assert f"step_{newest} is damaged, passed over: state.pt: its sha256" in log
    history = jobs.history(run)
    rewind = next(record for record in history if record["event"] == "rewind")
    assert (rewind["step"], list(rewind["damaged"])) == (older, [f"step_{newest}"])
    assert [r["step"] for r in history if r["event"] == "resume"] == [older]
    assert_same(run, whole)


def test_none_valid_stops_and_changes_nothing(run: Path, call: Run) -> None:
    """Checkpoints but none valid: exit 1, and the run directory is as it was."""
    for step in jobs.checkpoint_steps(run):
        damage(run / "checkpoints" / f"step_{step}")
    before = contents(run)
    ended = call(*ARGS, "--resume", "OUTPUT_DIR", run)
    assert ended.code == 1
    assert re.search(r"None of the \d+ checkpoints in .* is valid", ended.err)
    assert "Traceback" not in ended.output
    assert contents(run) == before


def test_a_torn_line_is_repaired_and_the_tail_kept(
    run: Path, half: Path, whole: Path, call: Run
) -> None:
    """Invariant 2: records after the checkpoint go to metrics.rewound.jsonl, byte for byte."""
    torn = b'{"step": 19, "epoch": 2, "train/lo'
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    length = jobs.state(half, SAVED)["files"]["metrics.jsonl"]
    tail = (run / "metrics.jsonl").read_bytes()[length:]
    call(*ARGS, "--resume", "OUTPUT_DIR", run).ok()
    assert (run / "metrics.rewound.jsonl").read_bytes() == tail
    assert tail.count(b"\n") >= 1 and tail.endswith(torn)
    assert_same(run, whole)


# One live job


def test_a_second_live_job_is_refused(
    run: Path, whole: Path, begin: Callable[..., Process], call: Run
) -> None:
    """Item 0: exit 2, naming host and pid; the claim of an owner that was killed is taken over."""
    owner = begin(*ARGS, "--resume", "OUTPUT_DIR", run, at=24, die=False)
    deadline = time.monotonic() + 60
    while jobs.status(run)["step"] < 21 or jobs.status(run)["pid"] != owner.pid:
        assert time.monotonic() < deadline, owner.output()
        time.sleep(0.05)
    time.sleep(0.7)
    before = contents(run) | {"status.json": None}  # the live owner's heartbeat
    for option in ("--overwrite", "--resume"):
        ended = call(*ARGS, option, "OUTPUT_DIR", run)
        assert ended.code == 2
        assert f"host {socket.gethostname()}, pid {owner.pid}" in ended.err
    assert contents(run) | {"status.json": None} == before
    owner.kill()
    call(*ARGS, "--resume", "OUTPUT_DIR", run).ok()
    assert_same(run, whole)


def test_orphans_end_and_a_successor_goes_on(tmp_path: Path) -> None:
    """Item 0: torchrun alone is killed; its ranks end, and a successor started at once finishes
    the run."""
    args = [*COMMON, "DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", tmp_path / "run"]
    job = jobs.start(*args, ranks=2, env={"LAUNCHER_TEST_SLEEP": "0.1"})
    orphans: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "run/checkpoints/step_4").exists():
            assert time.monotonic() < deadline and job.process.poll() is None, jobs.read(job.err)
            time.sleep(0.02)
        orphans = psutil.Process(job.process.pid).children(recursive=True)
        assert len(orphans) >= 2
        job.process.kill()
        successor = jobs.start(*args, "--resume", ranks=2)
        _, alive = psutil.wait_procs(orphans, timeout=15)
        assert alive == []
        successor.wait(120).ok()
    finally:
        job.kill()
        for process in orphans:
            if process.is_running():
                process.kill()
    assert jobs.status(tmp_path / "run")["state"] == "completed"
    assert [r["event"] for r in jobs.history(tmp_path / "run")].count("resume") == 1
    assert_once(tmp_path / "run")


# Disks


@pytest.fixture
def mount() -> Iterator[Callable[[Path, int], None]]:
    """Mount a small disk of so many bytes at a place; what is there moves onto it."""
    mounted: list[Path] = []

    def mount(place: Path, size: int) -> None:
        if os.geteuid() != 0:
            pytest.skip("mounting a tmpfs needs root")
        aside = place.with_name(f"{place.name}.moved")
        place.rename(aside)
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if done.returncode != 0:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        shutil.copytree(aside, place, symlinks=True, dirs_exist_ok=True)

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True, timeout=30)


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def failed(run: Path) -> list[dict[str, Any]]:
    """The saves that failed, from history.jsonl."""
    return [r for r in jobs.history(run) if r["event"] == "checkpoint" and "failed" in r]


def test_a_full_disk_costs_saves_and_nothing_else(
    run: Path, whole: Path, begin: Callable[..., Process], mount: Callable[[Path, int], None]
) -> None:
    """A save that fails is a warning, a history record and a later retry; training goes on, the
    older checkpoints stay, and with room again the run ends exactly."""
    checkpoints = run / "checkpoints"
    kept = jobs.checkpoint_steps(run)
    one = size_of(checkpoints / f"step_{kept[-1]}")
    mount(checkpoints, size_of(checkpoints) + 2 * one + (1 << 20))
    filler = checkpoints / "filler"
    filler.write_bytes(bytes(one + one // 2 + (1 << 20)))
    job = begin(*ARGS, "--resume", "OUTPUT_DIR", run, LAUNCHER_TEST_SLEEP="0.15")
    deadline = time.monotonic() + 60
    while not failed(run):
        assert time.monotonic() < deadline and job.process.is_alive(), job.output()
        time.sleep(0.02)
    assert jobs.checkpoint_steps(run) == kept
    assert not list(checkpoints.glob(".tmp_*"))
    filler.unlink()
    ended = job.wait().ok()
    assert "No space left on device" in failed(run)[0]["failed"]
    assert "could not be saved" in ended.output
    assert_same(run, whole)


def test_a_disk_that_stays_full_loses_no_record(
    run: Path, whole: Path, call: Run, mount: Callable[[Path, int], None]
) -> None:
    """No save succeeds: every record is there, the older checkpoints are, and the run says that it
    failed for want of its last checkpoint."""
    checkpoints = run / "checkpoints"
    kept = jobs.checkpoint_steps(run)
    mount(checkpoints, size_of(checkpoints) + (1 << 20))
    ended = call(*ARGS, "--resume", "OUTPUT_DIR", run)
    assert ended.code == 1
    assert "the last checkpoint could not be saved" in ended.output
    assert jobs.checkpoint_steps(run) == kept
    assert len(failed(run)) >= 3
    assert jobs.status(run)["state"] == "failed"
    assert records(run) == records(whole)


def test_a_read_only_directory_costs_saves_and_nothing_else(
    run: Path, whole: Path, begin: Callable[..., Process], mount: Callable[[Path, int], None]
) -> None:
    """The same where the checkpoints cannot be written at all, until they can."""
    checkpoints = run / "checkpoints"
    kept = jobs.checkpoint_steps(run)
    mount(checkpoints, 4 * size_of(checkpoints))
    remount = ["mount", "-o", "remount,ro", str(checkpoints)]
    subprocess.run(remount, check=True, timeout=30)
    job = begin(*ARGS, "--resume", "OUTPUT_DIR", run, LAUNCHER_TEST_SLEEP="0.15")
    deadline = time.monotonic() + 60
    while not failed(run):
        assert time.monotonic() < deadline and job.process.is_alive(), job.output()
        time.sleep(0.02)
    assert jobs.checkpoint_steps(run) == kept
    subprocess.run([*remount[:2], "remount,rw", remount[3]], check=True, timeout=30)
    job.wait().ok()
    assert "Read-only file system" in failed(run)[0]["failed"]
    assert_same(run, whole)


def test_a_full_run_directory_does_not_end_the_training(
    run: Path, begin: Callable[..., Process], mount: Callable[[Path, int], None]
) -> None:
    """Records, status and checkpoints on one disk without a byte left: training goes on, and the
    checkpoints stay."""
    kept = jobs.checkpoint_steps(run)
    one = size_of(run / "checkpoints" / f"step_{kept[-1]}")
    mount(run, size_of(run) + 2 * one)
    filler = run / "filler"
    job = begin(*ARGS, "--resume", "OUTPUT_DIR", run, LAUNCHER_TEST_SLEEP="0.5")
    deadline = time.monotonic() + 60
    while jobs.status(run)["pid"] != job.pid or jobs.metrics(run)[-1]["step"] < 21:
        assert time.monotonic() < deadline and job.process.is_alive(), job.output()
        time.sleep(0.02)
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    time.sleep(2.3)  # a record and a save are due meanwhile, and the run is not at its end
    assert job.process.is_alive(), job.output()
    filler.unlink()
    job.wait().ok()
    assert max(jobs.checkpoint_steps(run)) == STEPS
    assert jobs.status(run)["state"] == "completed"


# Changed configs


def test_changes_that_break_exactness_stop_a_resume(run: Path, call: Run) -> None:
    """Item 7: exit 2, every such key printed and offered to --allow; nothing changes."""
    changes = {
        "SEED": 1,
        "TRAIN.BATCH_SIZE": 4,
        "TASK.WIDTH": 320,
        "TRAIN.DURATION": "5ep",
        "OPTIM.SCHEDULE": "linear",
    }
    overrides = [word for change in changes.items() for word in change]
    before = contents(run)
    ended = call(*ARGS, "--resume", *overrides, "OUTPUT_DIR", run)
    assert ended.code == 2
    for key, value in changes.items():
        assert re.search(rf"^  {key}: .* -> {value!r}$", ended.err, re.M), ended.err
    offered = re.search(r"--allow (\S+)", ended.err)
    assert offered is not None
    assert set(offered[1].split(",")) == set(changes)
    assert contents(run) == before


def test_one_change_is_enough_and_may_be_allowed(whole: Path, tmp_path: Path, call: Run) -> None:
    """Item 7: TRAIN.DURATION of a completed run: refused, with --allow trained on; unchanged: the
    run says that it is complete."""
    run = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    before = contents(run)
    ended = call(*ARGS, "--resume", "OUTPUT_DIR", run).ok()
    assert "complete" in ended.output
    more = (*ARGS, "--resume", "TRAIN.DURATION", "5ep", "OUTPUT_DIR", run)
    assert call(*more).code == 2
    assert contents(run) == before
    call(*more, "--allow", "TRAIN.DURATION").ok()
    assert jobs.status(run)["step"] == 35
    assert_once(run)


def test_where_and_how_much_to_log_never_stops_a_resume(run: Path, whole: Path, call: Run) -> None:
    """Item 7: LOG.*, CHECKPOINT.* and EVAL.EVERY may change, and the weights stay the same."""
    free = "LOG.EVERY 2step LOG.LEVEL DEBUG LOG.TENSORBOARD False CHECKPOINT.EVERY 5step"
    free += " CHECKPOINT.KEEP_LAST 1 CHECKPOINT.METRIC val/loss CHECKPOINT.MODE min"
    ended = call(*ARGS, "--resume", *free.split(), "OUTPUT_DIR", run).ok()
    assert "changed since the checkpoint: LOG.EVERY '3step' -> '2step'" in ended.output
    ours, theirs = jobs.state(run, STEPS)["model"], jobs.state(whole)["model"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_data_set_length_needs_its_own_allow(run: Path, call: Run) -> None:
    """Item 7: the order of the samples depends on it."""
    args = (*ARGS, "--resume", "TASK.SAMPLES", 60, "OUTPUT_DIR", run)
    before = contents(run)
    ended = call(*args, "--allow", "TASK.SAMPLES")
    assert ended.code == 2
    assert "60 samples; the checkpoint was made with 52" in ended.err
    assert "--allow DATASET_LENGTH" in ended.err
    assert contents(run) == before
    call(*args, "--allow", "TASK.SAMPLES,DATASET_LENGTH").ok()


# Elsewhere


def test_resume_from_starts_a_directory_with_the_full_state(
    half: Path, whole: Path, tmp_path: Path, call: Run
) -> None:
    """`--resume-from CKPT`: another directory, the same end; the source stays as it is."""
    before = contents(half)
    source = half / "checkpoints" / f"step_{SAVED}"
    call(*ARGS, "--resume-from", source, "OUTPUT_DIR", tmp_path / "new").ok()
    assert contents(half) == before
    ours, theirs = jobs.state(tmp_path / "new"), jobs.state(whole)
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])
    assert records(tmp_path / "new") == [r for r in records(whole) if r["step"] > SAVED]
    first = jobs.history(tmp_path / "new")[0]
    assert (first["event"], first["step"], first["from"]) == ("start", SAVED, str(source))


class Recording(Exact):
    """Exact, with the samples it loads noted in the file LAUNCHER_TEST_SAMPLES."""

    def build_dataset(self, split: str) -> Any:
        dataset = super().build_dataset(split)
        if split == "train":
            kind = type("Noted", (type(dataset),), {"__getitem__": _noted(type(dataset))})
            dataset.__class__ = kind
        return dataset

    def train_step(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == int(os.environ.get("LAUNCHER_TEST_DIES", "0")):
            time.sleep(1)  # what was saved before has time to be committed
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_step(model, batch)


def _noted(kind: type) -> Callable[[Any, int], Any]:
    def get(self: Any, index: int) -> Any:
        name = f"{os.environ['LAUNCHER_TEST_SAMPLES']}.{os.environ.get('RANK', '0')}"
        with open(name, "a", encoding="utf-8") as file:
            file.write(f"{index}\n")
        return kind.__getitem__(self, index)

    return get


def noted(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()]


def test_another_number_of_ranks_keeps_the_order(tmp_path: Path, call: Run) -> None:
    """Invariant 3: begun on 2 ranks, gone on with on 1: the samples are those of one process, in
    its order, and no sample is loaded to be skipped."""
    args = [*ARGS, "TASK.NAME", f"{THIS}:Recording", "LOG.TENSORBOARD", "False", "OUTPUT_DIR"]
    run, one = tmp_path / "run", tmp_path / "one"
    call(*args, one, LAUNCHER_TEST_SAMPLES=str(tmp_path / "one.samples")).ok()
    env = {"LAUNCHER_TEST_SAMPLES": str(tmp_path / "two.samples"), "LAUNCHER_TEST_DIES": "11"}
    env["PYTHONPATH"] = str(jobs.ROOT)
    assert jobs.train(*args[1:], run, ranks=2, env=env).code != 0
    done = max(jobs.checkpoint_steps(run))
    assert 8 <= done < 11
    samples = jobs.state(run, done)["progress"]["samples"]
    call(*args, run, "--resume", LAUNCHER_TEST_SAMPLES=str(tmp_path / "rest.samples")).ok()
    order = noted(tmp_path / "one.samples.0")
    assert noted(tmp_path / "rest.samples.0") == order[samples:]
    epoch = order[samples : (samples // 52 + 1) * 52] + order[samples // 52 * 52 : samples]
    assert sorted(epoch) == list(range(52))
    before = noted(tmp_path / "two.samples.0") + noted(tmp_path / "two.samples.1")
    # The dead ranks had at most loaded ahead of what they trained.
    assert set(order[52:samples]) <= set(before)
    assert jobs.status(run)["state"] == "completed"
    assert_once(run)


# Commands


def test_eval_only(whole: Path, tmp_path: Path, call: Run) -> None:
    """`--eval-only`: the last, the best or a given checkpoint; printed, written to evaluations/,
    and metrics.jsonl is not touched."""
    run = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    before = {k: v for k, v in contents(run).items() if not k.startswith("evaluations")}
    best = int(os.readlink(run / "checkpoints/best").removeprefix("step_"))
    recorded = jobs.values(run, "val/accuracy")
    for number, (which, step) in enumerate(
        (("last", STEPS), ("best", best), (run / "checkpoints" / f"step_{best}", best)), start=1
    ):
        ended = call(*ARGS, "--eval-only", "--checkpoint", which, "OUTPUT_DIR", run).ok()
        printed = jobs.strict_json(ended.out.splitlines()[-1])
        files = sorted((run / "evaluations").glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
        assert len(files) == number, "an evaluation was lost"
        assert re.match(r"\d{8}T\d{6}Z", files[-1].name)
        written = json.loads(files[-1].read_text())
        assert set(written) == {"step", "checkpoint", "metrics"}
        assert written["metrics"] == printed
        assert written["step"] == step
        assert Path(written["checkpoint"]).resolve() == run / "checkpoints" / f"step_{step}"
        assert printed["val/accuracy"] == recorded[step]
    assert {k: v for k, v in contents(run).items() if not k.startswith("evaluations")} == before


def test_eval_only_without_a_checkpoint(half: Path, tmp_path: Path, call: Run) -> None:
    """A checkpoint that is not there is bad usage, and no directory is made."""
    for which in ("last", tmp_path / "step_3"):
        ended = call(*ARGS, "--eval-only", "--checkpoint", which, "OUTPUT_DIR", tmp_path / "run")
        assert ended.code == 2
        assert "Traceback" not in ended.output
    assert not (tmp_path / "run").exists()


def test_list_and_verify(run: Path, call: Run) -> None:
    """Item 8: step, epoch, metric, size, age, valid or why not; last and best marked."""
    steps = jobs.checkpoint_steps(run)
    best = os.readlink(run / "checkpoints/best")
    damage(run / "checkpoints" / f"step_{steps[-1]}")
    rows = json.loads(call("checkpoint", "list", run, "--json").ok().out)
    assert [row["step"] for row in rows] == steps
    assert [row["problem"] is None for row in rows] == [True] * (len(steps) - 1) + [False]
    assert [row["step"] for row in rows if row["last"]] == [steps[-2]]
    assert [f"step_{row['step']}" for row in rows if row["best"]] == [best]
    assert all(row["bytes"] > 1e6 and row["age_s"] >= 0 for row in rows)
    text = call("checkpoint", "list", run).ok().out
    assert len(text.splitlines()) == len(steps) + 1
    assert "damaged: state.pt: its sha256" in text.splitlines()[-1]
    ended = call("checkpoint", "verify", run, "--json")
    assert ended.code == 1
    problems = json.loads(ended.out)
    assert [name for name, why in problems.items() if why] == [f"step_{steps[-1]}"]
    assert call("checkpoint", "verify", run / "checkpoints" / f"step_{steps[0]}").ok()
    assert call("checkpoint", "verify", run / "nothing").code == 2


@pytest.fixture(scope="module")
def exported(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint's weights in every form that MODEL.WEIGHTS takes."""
    folder = tmp_path_factory.mktemp("exported")
    for name in ("w.pt", "w.safetensors", "ema.pt", "ema.safetensors"):
        if name.endswith("safetensors"):
            pytest.importorskip("safetensors")
        args = ["checkpoint", "export", whole / "checkpoints/last", "-o", folder / name]
        args += ["--ema"] if name.startswith("ema") else []
        Process(folder, tuple(args), {}, 0, False).wait().ok()
    weights = torch.load(folder / "w.pt", weights_only=True)
    torch.save({f"module.{k}": v for k, v in weights.items()}, folder / "ddp.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, folder / "nested.pt")
    other = {k: v for k, v in weights.items() if not k.startswith("8.")}
    torch.save(
        {**other, "0.weight": torch.zeros(7, 32), "head.weight": weights["8.bias"]},
        folder / "other.pt",
    )
    return folder


def test_weights_from_every_form(whole: Path, exported: Path) -> None:
    """Item 8: a checkpoint, exported files and somebody else's `module.` prefix give one model."""
    saved = jobs.state(whole)
    averaged = {k.removeprefix("module."): v for k, v in saved["ema"].items() if "." in k}
    model = torch.nn.Sequential()
    model.state_dict = lambda: saved["model"]  # type: ignore[method-assign]
    forms = {
        whole / "checkpoints/last": saved["model"],
        whole / f"checkpoints/step_{STEPS}": saved["model"],
        exported / "w.pt": saved["model"],
        exported / "w.safetensors": saved["model"],
        exported / "ddp.pt": saved["model"],
        exported / "nested.pt": saved["model"],
        exported / "ema.pt": averaged,
        exported / "ema.safetensors": averaged,
    }
    for path, expected in forms.items():
        fitting, report = match(read_weights(path)[0], model)
        assert report == "", path
        assert fitting.keys() == expected.keys(), path
        assert all(torch.equal(fitting[name], expected[name]) for name in expected), path


def test_weights_that_do_not_fit(exported: Path, whole: Path, tmp_path: Path, call: Run) -> None:
    """Item 8: every mismatch in one message (exit 2, no directory); WEIGHTS_STRICT False loads
    what fits, and a run starts from it."""
    args = (*ARGS, "TRAIN.DURATION", "1step", "OPTIM.WARMUP", "", "OPTIM.LR", "1e-30")
    args = (*args, "MODEL.WEIGHTS", exported / "other.pt", "OUTPUT_DIR", tmp_path / "run")
    ended = call(*args)
    assert ended.code == 2
    assert "2 missing: 8.bias; 8.weight" in ended.err
    assert "1 unexpected: head.weight" in ended.err
    assert "1 of another shape: 0.weight (7, 32), the model has (640, 32)" in ended.err
    assert "MODEL.WEIGHTS_STRICT" in ended.err
    assert not (tmp_path / "run").exists()
    call(*args, "MODEL.WEIGHTS_STRICT", "False").ok()
    ours, theirs = jobs.state(tmp_path / "run")["model"], jobs.state(whole)["model"]
    assert torch.equal(ours["4.weight"], theirs["4.weight"])
    assert not torch.equal(ours["0.weight"], theirs["0.weight"])
    before = jobs.metrics(tmp_path / "run")[0]
    assert before["step"] == 1


def test_a_run_starts_from_somebody_elses_weights(
    exported: Path, whole: Path, tmp_path: Path, call: Run
) -> None:
    """Item 8: MODEL.WEIGHTS with the prefix of DDP."""
    args = (*ARGS, "TRAIN.DURATION", "1step", "OPTIM.WARMUP", "", "OPTIM.LR", "1e-30")
    call(*args, "MODEL.WEIGHTS", exported / "ddp.pt", "OUTPUT_DIR", tmp_path / "run").ok()
    ours, theirs = jobs.state(tmp_path / "run")["model"], jobs.state(whole)["model"]
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs if not n.endswith("mean"))
