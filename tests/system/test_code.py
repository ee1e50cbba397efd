"""The code that ran, in the run directory; and resumes with other code: by hand, by a restart, from
a checkpoint of another run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.provenance.code import MOST_FILES, Code
from launcher.provenance.git import CUT, commit, difference
from launcher.provenance.kept import versions
from tests.system import jobs

TASK = """\
import code_helper
from launcher.tasks.sine import Sine

class Mine(Sine):
    def train_step(self, model, batch):
        import code_late
        values = super().train_step(model, batch)
        return {**values, "loss": values["loss"] * code_helper.FACTOR * code_late.FACTOR}
"""
CALLBACK = "class Called:\n    def __init__(self, run): ...\n"
KEYS = (
    *("TRAIN.BATCH_SIZE", "8", "TASK.TRAIN_SAMPLES", "40", "TASK.VAL_SAMPLES", "8"),
    *("EVAL.EVERY", "", "LOG.TENSORBOARD", "False", "DATALOADER.NUM_WORKERS", "0"),
)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    folder = tmp_path / "task"
    (folder / "more").mkdir(parents=True)
    (folder / "mine.py").write_text(TASK)
    (folder / "more/called.py").write_text(CALLBACK)
    for name in ("code_helper", "code_late"):
        (folder / f"{name}.py").write_text("FACTOR = 1.0\n")
    return folder


def words(task: Path, run: Path, steps: int, *more: object) -> list[object]:
    named = (
        "TASK.NAME",
        task / "mine.py:Mine",
        "OUTPUT_DIR",
        run,
        "TRAIN.DURATION",
        f"{steps}step",
    )
    return ["train", *named, *KEYS, *more]


def train(*args: object, ranks: int = 1, **env: str) -> jobs.Ended:
    command = words(*args)  # type: ignore[arg-type]
    with jobs.Group(command, ranks, env) if ranks > 1 else jobs.Forked(command, env) as job:
        return job.wait()


def edit(file: Path, line: str = "FACTOR = 1.5\n") -> None:
    file.write_text(line)


def kept(run: Path) -> dict[str, list[str]]:
    """Each version's files by name, oldest first."""
    return {version.name: list(version.digests) for version in versions(run)}


def test_what_is_kept(task: Path, tmp_path: Path) -> None:
    """The files as they ran, of callbacks too, the commit and what differs from it; the folder can
    be put in the place of the root."""
    run, git = tmp_path / "run", ["git", "-C", str(task)]
    git += ["-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    edit(task / "code_helper.py")
    (task / "untracked.py").write_text("")
    callback = ("CALLBACKS", f"[{task}/more/called.py:Called]")
    train(task, run, 2, *callback).ok()
    files = ["code_helper.py", "code_late.py", "mine.py", "more/called.py"]
    assert kept(run) == {"step_0": files}
    folder = run / "code/step_0"
    for name in files:
        assert (folder / "files" / name).read_bytes() == (task / name).read_bytes()
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert (folder / "commit.txt").read_text() == head.stdout
    patch = (folder / "diff.patch").read_text()
    assert "+FACTOR = 1.5" in patch and "untracked" not in patch
    manifest = jobs.strict_json((folder / "manifest.json").read_text())
    assert manifest["root"] == str(task)
    assert manifest["files"]["more/called.py"]["path"] == str(task / "more/called.py")
    (start,) = jobs.history(run, "start")
    assert start["code"] == "step_0" and "code_changed" not in start
    around = jobs.environment(run)
    assert around["lengths"] == {"train": 40} and around["kinds"] == {"train": "tensors"}


@pytest.mark.parametrize("ranks", [1, jobs.slow(2)])
def test_a_resume_by_hand_stops_where_the_code_changed(
    ranks: int, task: Path, tmp_path: Path
) -> None:
    """Before anything is touched, naming the files; with --allow CODE it goes on and keeps the new
    version; where nothing has changed nothing is written."""
    run, changed = tmp_path / "run", ("--resume", "--allow", "TRAIN.DURATION")
    train(task, run, 2, ranks=ranks).ok()
    train(task, run, 3, *changed, ranks=ranks).ok()
    assert list(kept(run)) == ["step_0"]
    edit(task / "code_late.py")  # no more than a step imports it
    edit(task / "code_helper.py", "FACTOR = 1.0\nMORE = 1\n")
    with jobs.unchanged(run, ".lock"):
        stopped = train(task, run, 4, *changed, ranks=ranks)
    assert stopped.code == (2 if ranks == 1 else 1)
    for told in ("code_late.py +1 -1", "code_helper.py +1 -0", "diff -u ", "--allow CODE"):
        assert told in stopped.err
    assert "mine.py" not in stopped.err.partition("Look at")[0]

    allowed = ("--resume", "--allow", "TRAIN.DURATION,CODE")
    went_on = train(task, run, 4, *allowed, ranks=ranks).ok()
    assert "code_late.py +1 -1" in went_on.err
    edit(task / "code_late.py", "FACTOR = 1.7\n")
    edit(task / "code_helper.py", "FACTOR = 1.0\n")
    train(task, run, 5, *allowed, ranks=ranks).ok()
    assert list(kept(run)) == ["step_0", "step_3", "step_4"]
    *_, last = jobs.history(run, "resume")
    assert last["code"] == "step_4"
    assert last["code_changed"] == ["code_helper.py +0 -1", "code_late.py +1 -1"]
    train(task, run, 6, *changed, ranks=ranks).ok()
    assert jobs.history(run, "resume")[-1]["code"] == "step_4"


def test_a_restart_goes_on(task: Path, tmp_path: Path) -> None:
    """By torchrun, Slurm or the queue, with a warning and a record: nobody is there to allow it. At
    the same step once more, nothing is overwritten."""
    run = tmp_path / "run"
    train(task, run, 2).ok()
    for count, name in ((1, "step_2"), (2, "step_2-2")):
        # As if it had been killed before its next checkpoint.
        (run / "status.json").write_text(json.dumps({**jobs.status(run), "state": "failed"}))
        shutil.rmtree(run / "checkpoints/step_3", ignore_errors=True)
        edit(task / "code_helper.py", f"FACTOR = 1.{count}\n")
        ended = train(task, run, 3, "--allow", "TRAIN.DURATION", SLURM_RESTART_COUNT="1").ok()
        assert "code_helper.py +1 -1" in ended.err
        record = jobs.history(run, "resume")[-1]
        assert (record["code"], record["code_changed"]) == (name, ["code_helper.py +1 -1"])
    assert list(kept(run)) == ["step_0", "step_2", "step_2-2"]


def test_a_checkpoint_of_another_run(task: Path, tmp_path: Path) -> None:
    """It is compared with the code that made it, whatever that run has had since."""
    run = tmp_path / "run"
    train(task, run, 2).ok()
    edit(task / "code_helper.py")
    train(task, run, 3, "--resume", "--allow", "TRAIN.DURATION,CODE").ok()
    place, to = run / "checkpoints/step_2", tmp_path / "to"
    further = ("--resume-from", place, "--allow", "TRAIN.DURATION")
    stopped = train(task, to, 4, *further)
    assert stopped.code == 2 and "code_helper.py +1 -1" in stopped.err and not to.exists()
    edit(task / "code_helper.py", "FACTOR = 1.0\n")
    train(task, to, 4, *further).ok()
    (start,) = jobs.history(to, "start")
    assert (start["code"], start["step"]) == ("step_2", 2)


def test_a_complete_run_says_so_whatever_its_code_is(task: Path, tmp_path: Path) -> None:
    train(task, tmp_path / "run", 2).ok()
    edit(task / "code_helper.py")
    assert "complete" in train(task, tmp_path / "run", 2, "--resume").ok().err


def test_a_run_of_an_earlier_version_goes_on_silently(task: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(task, run, 2).ok()
    shutil.rmtree(run / "code")
    edit(task / "code_helper.py")
    ended = train(task, run, 3, "--resume", "--allow", "TRAIN.DURATION").ok()
    assert "code_helper" not in ended.err
    assert list(kept(run)) == ["step_2"]
    assert "code_changed" not in jobs.history(run, "resume")[-1]


def test_the_folder_of_the_task_may_move(task: Path, tmp_path: Path) -> None:
    """To another place, with the same files: that is the same code, of a module too that is not
    loaded yet."""
    run = tmp_path / "run"
    train(task, run, 2).ok()
    moved = Path(shutil.move(task, tmp_path / "moved"))
    more = ("--resume", "--allow", "TRAIN.DURATION,TASK.NAME")
    train(moved, run, 3, *more).ok()
    assert list(kept(run)) == ["step_0"]
    (moved / "code_late.py").unlink()
    stopped = train(moved, run, 4, *more)
    assert stopped.code == 2 and "code_late.py +0 -1 (gone)" in stopped.err


def test_a_file_that_is_only_loaded_does_not_stop_a_resume(task: Path, tmp_path: Path) -> None:
    """As where another script starts the launcher; one that an unchanged import leads to does."""
    run, more = tmp_path / "run", ("--resume", "--allow", "TRAIN.DURATION")
    helper = "FACTOR = 1.0\ntry:\n    import code_more\nexcept ImportError: ...\n"
    (task / "code_helper.py").write_text(helper)
    train(task, run, 2).ok()
    script = task / "script.py"
    script.write_text("import sys, code_loaded, launcher.cli\nsys.exit(launcher.cli.main())\n")
    (task / "code_loaded.py").write_text("")
    command = [sys.executable, script, *words(task, run, 3, *more)]
    with jobs.Job(command) as job:
        job.wait().ok()
    assert "code_loaded.py" in kept(run)["step_2"]
    (task / "code_more.py").write_text("")
    stopped = train(task, run, 4, *more)
    assert stopped.code == 2 and "code_more.py +0 -0 (new)" in stopped.err


def test_what_is_too_large_and_what_git_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is left out is named, and a change of it is still found; a long difference ends
    in a line that says so."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "code_large.py").write_text("X = 1\n" + "#" * MOST_FILES)
    __import__("code_large")
    try:
        code, run = Code(["code_large"]), tmp_path / "run"
        run.mkdir()
        assert code.keep(run, 0, "") == {"code": "step_0", "code_left_out": ["code_large.py"]}
        (version,) = versions(run)
        assert not version.file("code_large.py").exists()
        with (tmp_path / "code_large.py").open("a") as file:
            file.write("#")
        (change,) = Code(["code_large"]).changes(version)
        assert str(change) == "code_large.py (changed; it was too large to keep)"
    finally:
        del sys.modules["code_large"]
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    (tmp_path / "text").write_text("a\n")
    for command in (["init", "-q"], ["add", "text"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    assert commit(tmp_path) != "" and difference(tmp_path, 50) == ""
    # An environment inside a repository, which ignores it, is not of its commit.
    (tmp_path / ".gitignore").write_text("ignored\n")
    (tmp_path / "ignored/site-packages").mkdir(parents=True)
    assert commit(tmp_path / "ignored/site-packages") == ""
    (tmp_path / "text").write_text("b\n" * 100)
    assert difference(tmp_path, 50).endswith(CUT) and len(difference(tmp_path, 50)) < 150
