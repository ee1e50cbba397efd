"""The run directory: what it holds, whether it can be written, its small files."""

import json
import os
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.telemetry.rundir import RunDirectory, replace_json

HERE = {"step": 3, "epoch": 1, "samples": 24}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    return directory


@pytest.mark.parametrize("name", ["config.yaml", "status.json", "metrics.jsonl", "checkpoints/"])
def test_any_trace_of_a_run_is_one(run: RunDirectory, name: str) -> None:
    path = run.path / name
    path.mkdir() if name.endswith("/") else path.touch()
    assert run.holds_run()


def test_an_empty_directory_or_other_files_are_no_run(run: RunDirectory) -> None:
    assert not RunDirectory(run.path / "absent").holds_run()
    assert not run.holds_run()
    (run.path / "notes.txt").touch()
    (run.path / "logs").mkdir()
    assert not run.holds_run()


def test_set_aside_twice_within_a_second_loses_nothing(run: RunDirectory) -> None:
    asides = []
    for i in range(4):
        run.create()
        run.config.write_text(str(i))
        asides.append(run.set_aside())
        assert not run.path.exists()
    assert [(aside / "config.yaml").read_text() for aside in asides] == list("0123")
    assert all(aside.name.startswith("run.old-2") for aside in asides)
    assert all(aside.parent == run.path.parent for aside in asides)


def snapshot(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.rglob("*"))


@pytest.mark.parametrize("name", ["new", "new/er/still", "there"])
def test_a_writable_place_is_not_touched(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").mkdir()
    before = snapshot(tmp_path)
    RunDirectory(tmp_path / name).check_writable()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["file", "file/run", "file/run/deeper", "/proc/run", "/proc/sys/a/b", "n" * 300]
)
def test_an_impossible_place_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="OUTPUT_DIR") as caught:
        RunDirectory(tmp_path / name).check_writable()
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert (tmp_path / "file").is_file()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="root alone changes its user")
@pytest.mark.parametrize("mode", [0o755, 0o700], ids=["not writable", "not readable"])
def test_a_place_of_another_user_is_told(tmp_path: Path, mode: int) -> None:
    # pytest's own folders are closed to other users, so this one lies elsewhere.
    place = Path("/tmp") / f"launcher-test-{os.getpid()}-{mode}"
    place.mkdir(mode=mode)
    try:
        os.seteuid(65534)
        with pytest.raises(UsageError, match="OUTPUT_DIR"):
            RunDirectory(place / "run").check_writable()
    finally:
        os.seteuid(0)
        place.rmdir()


def test_create_tells_why_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"OUTPUT_DIR .* cannot be made"):
        RunDirectory(tmp_path / "file" / "run").create()


def test_status(run: RunDirectory) -> None:
    assert run.read_status() == {}
    run.write_status("running", HERE)
    run.write_status("failed", HERE, "ValueError: x")
    status = run.read_status()
    assert set(status) == {"state", "step", "epoch", "reason", "host", "pid", "updated"}
    assert (status["state"], status["step"], status["epoch"]) == ("failed", 3, 1)
    assert (status["reason"], status["pid"]) == ("ValueError: x", os.getpid())


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_status_that_cannot_be_read_is_none(run: RunDirectory, text: str) -> None:
    run.status.write_bytes(text.encode("latin-1"))
    assert run.read_status() == {}


def test_small_files_are_replaced_whole(run: RunDirectory) -> None:
    """A reader with the old file open still sees the old one; nothing else is left behind."""
    run.write_status("running", HERE)
    with run.status.open() as old:
        inode = os.fstat(old.fileno()).st_ino
        run.write_status("completed", HERE)
        assert json.load(old)["state"] == "running"
    assert run.status.stat().st_ino != inode
    assert os.listdir(run.path) == ["status.json"]


def test_a_failing_write_leaves_the_old_file(run: RunDirectory) -> None:
    run.write_status("running", HERE)
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ValueError):
        replace_json(run.status, loop)
    assert run.read_status()["state"] == "running"


def test_history_is_appended(run: RunDirectory) -> None:
    run.write_history("start", 0, world_size=2)
    run.write_history("checkpoint", 40, path=Path("step_40"), seconds=0.5)
    start, saved = map(json.loads, run.history.read_text().splitlines())
    assert (start["event"], start["step"], start["world_size"]) == ("start", 0, 2)
    assert (saved["event"], saved["step"], saved["path"]) == ("checkpoint", 40, "step_40")
    assert start["time"] <= saved["time"]
