"""What checkpoints promise over whole runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.models.weights import match, read_weights
from tests.system import jobs
from tests.system.exact import COMMON, assert_same, assert_same_weights, records
from tests.system.jobs import flip_a_bit, launch
from tests.system.leash import Leash

ARGS = [*COMMON, "DATALOADER.NUM_WORKERS", "0"]
STEPS = 28  # of the whole run
DIES_AT, RECORDED, SAVED = 19, 18, 16  # the interrupted run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run. Not to be changed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    jobs.train(*ARGS, "OUTPUT_DIR", run).ok()
    return run


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed at step 19. Not to be changed."""
    folder = tmp_path_factory.mktemp("half")
    leash, run = Leash(folder, DIES_AT), folder / "run"
    with jobs.start(*ARGS, "OUTPUT_DIR", run, env=leash.env) as job:
        leash.wait(job)
        jobs.wait_for_step(run, RECORDED, job)
        jobs.wait_for_save(run, SAVED, job)
    return run


@pytest.fixture
def run(half: Path, tmp_path: Path) -> Path:
    """A copy of the killed run."""
    return Path(shutil.copytree(half, tmp_path / "run", symlinks=True))


@pytest.fixture
def completed(whole: Path, tmp_path: Path) -> Path:
    """A copy of the uninterrupted run."""
    return Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))


def resume(run: Path, *args: object) -> jobs.Ended:
    return jobs.train(*ARGS, "--resume", "OUTPUT_DIR", run, *args)


def damage(run: Path, step: int) -> None:
    flip_a_bit(run / f"checkpoints/step_{step}/state.pt")


def unchanged(run: Path, *but: str) -> AbstractContextManager[None]:
    """Nothing is changed but the claim, which says who looked last."""
    return jobs.unchanged(run, ".", ".lock", *but)


# Finding


def test_a_damaged_newest_is_passed_over_and_a_torn_tail_set_aside(run: Path, whole: Path) -> None:
    """Invariants 2 and 5: the damage is named in log and history, the records after the checkpoint
    go to metrics.rewound.jsonl byte for byte, and the run ends exactly all the same."""
    *_, older, newest = jobs.checkpoint_steps(run)
    damage(run, newest)
    torn = b'{"step": 19, "epoch": 2, "train/lo'
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    length = jobs.state(run, older)["files"]["metrics.jsonl"]
    tail = (run / "metrics.jsonl").read_bytes()[length:]
    resume(run).ok()
    log = (run / "logs/rank0.log").read_text()
    assert f"step_{newest} is damaged, passed over: state.pt: its sha256" in log
    (rewind,) = jobs.history(run, "rewind")
    assert (rewind["step"], list(rewind["damaged"])) == (older, [f"step_{newest}"])
    assert [record["step"] for record in jobs.history(run, "resume")] == [older]
    assert (run / "metrics.rewound.jsonl").read_bytes() == tail
    assert tail.count(b"\n") >= 1 and tail.endswith(torn)
    assert_same(run, whole)


def test_none_valid_stops_and_changes_nothing(run: Path) -> None:
    for step in jobs.checkpoint_steps(run):
        damage(run, step)
    with unchanged(run):
        ended = resume(run)
    assert ended.code == 1
    assert re.search(r"None of the \d+ checkpoints in .* is valid", ended.err)
    assert "Traceback" not in ended.output


# One live job


def test_a_second_live_job_is_refused(run: Path, whole: Path, tmp_path: Path) -> None:
    """Item 0: exit 2, naming host and pid; the claim of an owner that was killed is taken over."""
    leash = Leash(tmp_path, 24)
    with jobs.start(*ARGS, "--resume", "OUTPUT_DIR", run, env=leash.env) as owner:
        leash.wait(owner)
        jobs.wait_for_step(run, 24, owner)
        jobs.wait_for_save(run, 24, owner)
        for option in ("--overwrite", "--resume"):
            with unchanged(run, "status.json"):  # the live owner's heartbeat
                ended = jobs.train(*ARGS, option, "OUTPUT_DIR", run)
            assert ended.code == 2
            assert f"host {socket.gethostname()}, pid {owner.pid}" in ended.err
    resume(run).ok()
    assert_same(run, whole)


@pytest.mark.slow
def test_of_two_jobs_that_start_at_once_one_is_refused(tmp_path: Path) -> None:
    """Both found the directory free, and built their models; nothing of the first is set aside."""
    run = tmp_path / "run"
    words = [*ARGS, "OUTPUT_DIR", run]
    first = {"LAUNCHER_TEST_SLEEP": "0.3", "LAUNCHER_TEST_BUILD_SLEEP": "2"}
    second = {"LAUNCHER_TEST_BUILD_SLEEP": "6"}
    with jobs.start(*words, env=first) as owner, jobs.start(*words, env=second) as other:
        ended = other.wait(60)
        assert owner.poll() is None  # it lived when the other was ready
        assert ended.code == 2 and f"pid {owner.pid}" in ended.err
        owner.wait(120).ok()
    assert jobs.status(run)["state"] == "completed"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


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
    """The saves that failed."""
    return [record for record in jobs.history(run, "checkpoint") if "failed" in record]


@pytest.mark.parametrize(
    ("fault", "told"), [("full", "No space left on device"), ("ro", "Read-only file system")]
)
def test_a_disk_that_takes_no_save_costs_saves_and_nothing_else(
    fault: str, told: str, run: Path, whole: Path, tmp_path: Path, mount: Callable[..., None]
) -> None:
    """A save that fails is a warning, a history record and a later retry; training goes on, the
    older checkpoints stay, and once it can be written again the run ends exactly."""
    checkpoints = run / "checkpoints"
    kept = jobs.checkpoint_steps(run)
    one = size_of(checkpoints / f"step_{kept[-1]}")
    mount(checkpoints, size_of(checkpoints) + 2 * one + (1 << 20))
    filler = checkpoints / "filler"

    def make(state: str) -> None:
        if state == "full":
            filler.write_bytes(bytes(one + one // 2 + (1 << 20)))
        elif fault == "full":
            filler.unlink()
        else:
            subprocess.run(["mount", "-o", f"remount,{state}", str(checkpoints)], check=True)

    leash = Leash(tmp_path, 23)
    make(fault)
    with jobs.start(*ARGS, "--resume", "OUTPUT_DIR", run, env=leash.env) as job:
        job.until(lambda: failed(run), "a save that fails")
        assert jobs.checkpoint_steps(run) == kept
        assert not list(checkpoints.glob(".tmp_*"))
        make("rw")
        leash.to(STEPS)
        ended = job.wait().ok()
    assert told in failed(run)[0]["failed"]
    assert "could not be saved" in ended.output
    assert_same(run, whole)


def test_a_disk_that_stays_full_loses_no_record(
    run: Path, whole: Path, mount: Callable[[Path, int], None]
) -> None:
    """No save succeeds: every record is there, the older checkpoints are, and the run says that it
    failed for want of its last checkpoint."""
    checkpoints = run / "checkpoints"
    kept = jobs.checkpoint_steps(run)
    mount(checkpoints, size_of(checkpoints) + (1 << 20))
    ended = resume(run)
    assert ended.code == 1
    assert "the last checkpoint could not be saved" in ended.output
    assert jobs.checkpoint_steps(run) == kept
    assert len(failed(run)) >= 3
    assert jobs.status(run)["state"] == "failed"
    assert records(run) == records(whole)


def test_a_full_run_directory_does_not_end_the_training(
    run: Path, tmp_path: Path, mount: Callable[[Path, int], None]
) -> None:
    """Records, status and checkpoints on one disk without a byte left: training goes on, and the
    checkpoints stay."""
    kept = jobs.checkpoint_steps(run)
    one = size_of(run / "checkpoints" / f"step_{kept[-1]}")
    mount(run, size_of(run) + 2 * one)
    leash = Leash(tmp_path, 21)
    with jobs.start(*ARGS, "--resume", "OUTPUT_DIR", run, env=leash.env) as job:
        leash.wait(job)
        jobs.wait_for_step(run, 21, job)
        with (run / "filler").open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
        leash.to(STEPS - 2)  # a record and a save are due meanwhile
        leash.wait(job)
        (run / "filler").unlink()
        leash.to(STEPS)
        job.wait().ok()
    assert max(jobs.checkpoint_steps(run)) == STEPS
    assert jobs.status(run)["state"] == "completed"


# Changed configs


def test_changes_that_break_exactness_stop_a_resume(run: Path) -> None:
    """Item 7: exit 2, every such key printed and offered to --allow; nothing changes."""
    changes = {"SEED": 1, "TRAIN.BATCH_SIZE": 4, "TASK.WIDTH": 320}
    changes |= {"TRAIN.DURATION": "5ep", "OPTIM.SCHEDULE": "linear"}
    with unchanged(run):
        ended = resume(run, *(word for change in changes.items() for word in change))
    assert ended.code == 2
    for key, value in changes.items():
        assert re.search(rf"^  {key}: .* -> {value!r}$", ended.err, re.M), ended.err
    (offered,) = re.findall(r"--allow (\S+)", ended.err)
    assert set(offered.split(",")) == set(changes)


def test_one_change_is_enough_and_may_be_allowed(completed: Path) -> None:
    """Item 7: TRAIN.DURATION of a completed run: refused, with --allow trained on."""
    longer = ("TRAIN.DURATION", "5ep")
    with unchanged(completed):
        assert resume(completed, *longer).code == 2
    resume(completed, *longer, "--allow", "TRAIN.DURATION").ok()
    differs = jobs.history(completed, "resume")[-1]["differs"]
    assert any(told.startswith("TRAIN.DURATION: ") for told in differs)
    assert jobs.status(completed)["step"] == 35
    jobs.assert_once(completed)


def test_where_and_how_much_to_log_never_stops_a_resume(run: Path, whole: Path) -> None:
    """Item 7: LOG.*, CHECKPOINT.* and EVAL.EVERY may change, and the weights stay the same."""
    free = "LOG.EVERY 2step LOG.LEVEL DEBUG LOG.TENSORBOARD False CHECKPOINT.EVERY 5step"
    free += " CHECKPOINT.KEEP_LAST 1 CHECKPOINT.METRIC val/loss CHECKPOINT.MODE min"
    ended = resume(run, *free.split()).ok()
    assert "changed since the checkpoint: LOG.EVERY: '3step' -> '2step'" in ended.output
    assert_same_weights(run, whole)


def test_another_data_set_length_needs_its_own_allow(run: Path) -> None:
    """Item 7: the order of the samples depends on it."""
    with unchanged(run):
        ended = resume(run, "TASK.SAMPLES", 60, "--allow", "TASK.SAMPLES")
    assert ended.code == 2
    assert "DATASET_LENGTH: 52 -> 60" in ended.err
    assert "--allow DATASET_LENGTH" in ended.err
    resume(run, "TASK.SAMPLES", 60, "--allow", "TASK.SAMPLES,DATASET_LENGTH").ok()


# Elsewhere


def test_resume_from_starts_a_directory_with_the_full_state(
    half: Path, whole: Path, tmp_path: Path
) -> None:
    """`--resume-from CKPT`: another directory, the same end; the source stays as it is."""
    source, new = half / "checkpoints" / f"step_{SAVED}", tmp_path / "new"
    with unchanged(half):
        jobs.train(*ARGS, "--resume-from", source, "OUTPUT_DIR", new).ok()
    assert_same_weights(new, whole)
    assert records(new) == [r for r in records(whole) if r["step"] > SAVED]
    first = jobs.history(new)[0]
    assert (first["event"], first["step"], first["from"]) == ("start", SAVED, str(source))


# Commands


def evaluate(run: Path, which: object) -> jobs.Ended:
    return jobs.train(*ARGS, "--eval-only", "--checkpoint", which, "OUTPUT_DIR", run)


def test_eval_only(completed: Path) -> None:
    """`--eval-only`: the last, the best or a given checkpoint; printed, written to evaluations/,
    and nothing else is touched."""
    best = int(os.readlink(completed / "checkpoints/best").removeprefix("step_"))
    recorded = jobs.values(completed, "val/accuracy")
    path = completed / "checkpoints" / f"step_{best}"
    seen: set[Path] = set()
    for which, step in (("last", STEPS), ("best", best), (path, best)):
        ended = jobs.train(
            *ARGS, "--eval-only", "--checkpoint", which, "OUTPUT_DIR", completed
        ).ok()
        printed = jobs.strict_json(ended.out.splitlines()[-1])
        (new,) = set((completed / "evaluations").glob("*.json")) - seen
        seen.add(new)
        assert re.match(r"\d{8}T\d{6}Z", new.name)
        written = json.loads(new.read_text())
        assert set(written) == {"step", "checkpoint", "metrics"}
        assert (written["metrics"], written["step"]) == (printed, step)
        assert Path(written["checkpoint"]).resolve() == completed / f"checkpoints/step_{step}"
        assert printed["val/accuracy"] == recorded[step]


def test_eval_only_without_a_checkpoint(tmp_path: Path) -> None:
    """A checkpoint that is not there is bad usage, and no directory is made."""
    for which in ("last", tmp_path / "step_3"):
        ended = jobs.train(
            *ARGS, "--eval-only", "--checkpoint", which, "OUTPUT_DIR", tmp_path / "run"
        )
        assert ended.code == 2
        assert "Traceback" not in ended.output
    assert not (tmp_path / "run").exists()


def test_list_and_verify(run: Path) -> None:
    """Item 8: step, epoch, metric, size, age, valid or why not; last and best marked."""
    *_, before, damaged = steps = jobs.checkpoint_steps(run)
    best = os.readlink(run / "checkpoints/best")
    damage(run, damaged)
    rows = json.loads(launch("checkpoint", "list", run, "--json").ok().out)
    assert [row["step"] for row in rows] == steps
    assert [row["step"] for row in rows if row["problem"] is not None] == [damaged]
    assert [row["step"] for row in rows if row["last"]] == [before]
    assert [f"step_{row['step']}" for row in rows if row["best"]] == [best]
    assert all(row["bytes"] > 1e6 and row["age_s"] >= 0 for row in rows)
    lines = launch("checkpoint", "list", run).ok().out.splitlines()
    assert len(lines) == len(steps) + 1
    assert "damaged: state.pt: its sha256" in lines[-1]
    ended = launch("checkpoint", "verify", run, "--json")
    assert ended.code == 1
    problems = json.loads(ended.out)
    assert [name for name, why in problems.items() if why] == [f"step_{damaged}"]
    launch("checkpoint", "verify", run / "checkpoints" / f"step_{steps[0]}").ok()
    assert launch("checkpoint", "verify", run / "nothing").code == 2


@pytest.fixture(scope="module")
def exported(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint's weights in files of every form, and in one as others make them."""
    pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("exported")
    for name, option in (("w", []), ("ema", ["--ema"])):
        for suffix in ("pt", "safetensors"):
            file = folder / f"{name}.{suffix}"
            launch("checkpoint", "export", whole / "checkpoints/last", "-o", file, *option).ok()
    weights = torch.load(folder / "w.pt", weights_only=True)
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, folder / "nested.pt")
    return folder


def test_weights_from_every_form(whole: Path, exported: Path) -> None:
    """Item 8: a checkpoint, exported files and somebody else's `module.` prefix give one model;
    tests/models/test_weights.py has other forms."""
    saved = jobs.state(whole)
    averaged = {k.removeprefix("module."): v for k, v in saved["ema"].items() if "." in k}
    model = torch.nn.Sequential()
    model.state_dict = lambda: saved["model"]  # type: ignore[method-assign]
    plain = [whole / "checkpoints/last", whole / f"checkpoints/step_{STEPS}"]
    plain += [exported / name for name in ("w.pt", "w.safetensors", "nested.pt")]
    ema = [exported / "ema.pt", exported / "ema.safetensors"]
    for path in plain + ema:
        expected = averaged if path in ema else saved["model"]
        fitting, report = match(read_weights(path)[0], model)
        assert report == "", path
        assert fitting.keys() == expected.keys(), path
        assert all(torch.equal(fitting[name], expected[name]) for name in expected), path


def test_weights_that_do_not_fit(exported: Path, whole: Path, tmp_path: Path) -> None:
    """Item 8: every mismatch in one message (exit 2, no directory); WEIGHTS_STRICT False loads
    what fits, and a run starts from it, here from names with the prefix of DDP."""
    run, other = tmp_path / "run", torch.load(exported / "nested.pt")["state_dict"]
    other["module.0.weight"] = torch.zeros(7, 32)
    other["module.head.weight"] = other.pop("module.8.bias")
    del other["module.8.weight"]
    torch.save(other, tmp_path / "other.pt")
    # One step, too small to be seen.
    args = (*ARGS, "TRAIN.DURATION", "1step", "OPTIM.WARMUP", "", "OPTIM.LR", "1e-30")
    args += ("MODEL.WEIGHTS", tmp_path / "other.pt", "OUTPUT_DIR", run)
    ended = jobs.train(*args)
    assert ended.code == 2
    told = ["2 missing: 8.bias; 8.weight", "1 unexpected: head.weight", "MODEL.WEIGHTS_STRICT"]
    told += ["1 of another shape: 0.weight (7, 32), the model has (640, 32)"]
    assert [text for text in told if text not in ended.err] == []
    assert not run.exists()
    jobs.train(*args, "MODEL.WEIGHTS_STRICT", "False").ok()
    ours, theirs = jobs.state(run)["model"], jobs.state(whole)["model"]
    trained = [name for name in theirs if not name.endswith("mean")]
    fitting = {name for name in trained if torch.equal(ours[name], theirs[name])}
    assert fitting == set(trained) - {"0.weight", "8.weight", "8.bias"}
    assert min(jobs.values(run, "train/loss")) == 1
