"""The command: help, exit codes, refusals, and what answers without importing torch."""

import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest

from launcher import __version__, cli
from launcher.api.attempt import check_writable
from launcher.errors import RunError, UsageError
from tests.cli.launched import imported_by, run
from tests.system.jobs import DIGITS, Job

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize(("words", "code"), [("--help", 0), ("-h", 0), ("", 2)])
def test_help_lists_the_commands(words: str, code: int, capsys: Captured) -> None:
    assert run(words) == code
    out = capsys.readouterr().out
    assert out.startswith("usage: launcher COMMAND")
    assert all(f"  {name}" in out for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: Captured) -> None:
    assert run(f"{command} --help") == 0
    assert f"launcher {command}" in capsys.readouterr().out


def test_version(capsys: Captured) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"launcher {__version__}\n"


@pytest.mark.parametrize(("name", "hint"), [("trian", " (did you mean train?)"), ("zzz", "")])
def test_an_unknown_command(name: str, hint: str, capsys: Captured) -> None:
    assert run(name) == 2
    told = f"launcher: there is no command {name!r}{hint}; see launcher --help\n"
    assert capsys.readouterr() == ("", told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("config", "arguments are required: command"),
        ("config sing", "invalid choice: 'sing'"),
        ("config keys --markdown SEED 1", "--markdown shows the defaults; give it alone"),
        ("config diff one", "arguments are required: B"),
        ("train --bogus", "unrecognized arguments: --bogus"),
        # No abbreviations: a later option would change their meaning.
        ("train --overw", "unrecognized arguments: --overw"),
        ("train --config-file", "expected one argument"),
        ("train SEED 1 --config-file", "expected one argument"),
        ("train --resume=yes", "--resume"),
        ("runs plot a --smooth 1 -o p.svg", "--smooth"),
        ("runs plot a --smooth -0.1 -o p.svg", "--smooth"),
        ("runs plot a --smooth nan -o p.svg", "--smooth"),
        ("runs plot a --smooth much -o p.svg", "--smooth"),
        ("config keys LR 1", "did you mean OPTIM.LR"),
        ("config diff empty empty", "no run directory"),
        ("config diff gone.yaml gone.yaml", "no such file"),
        ("tune-loader --seconds 0", "--seconds"),
        ("tune-loader --seconds nan", "--seconds"),
        ("tune-loader --ranks -2", "--ranks"),
        ("tune-loader TASK.NAME sine SEEED 1", "did you mean SEED"),
    ],
)
def test_bad_options_and_mistakes_exit_with_2(words: str, told: str, capsys: Captured) -> None:
    Path("empty").mkdir()
    assert run(words) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "code"), [(UsageError, 2), (RunError, 1)])
@pytest.mark.parametrize("rank", [None, "0", "3"])
def test_a_mistake_is_one_message_and_a_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    kind: type[UsageError],
    code: int,
    rank: str | None,
) -> None:
    """Rank 0 speaks first: the others wait until it has left."""
    waited: list[float] = []
    monkeypatch.setattr("launcher.cli.time.sleep", waited.append)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert cli.call(Mock(side_effect=kind("mend this")), []) == code
    prefix = "launcher: rank 3" if rank == "3" else "launcher"
    assert capsys.readouterr().err == f"{prefix}: mend this\n"
    assert waited == ([cli.GRACE_S] if rank == "3" else [])


def test_check_prints_the_config_and_makes_nothing(tmp_path: Path, capsys: Captured) -> None:
    """Overrides in any order and both forms; the last one wins."""
    words = f"OPTIM.LR=1 --check TRAIN.DURATION 5ep --config-file {DIGITS}"
    assert run(f"train {words} OPTIM.LR 1e-3 TRAIN.DURATION=20ep") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"  LR: 0.001", "  DURATION: 20ep", "OUTPUT_DIR: runs/digits"} <= set(lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--help", 0),
        ("train --help", 0),
        (f"train --config-file {DIGITS} --check", 0),
        ("config list", 0),
        ("config keys", 0),
        ("config keys --json", 0),
        ("tune-loader TASK.NAME sine SEEED 1", 2),
    ],
)
def test_answers_without_torch(words: str, code: int) -> None:
    """tests/system/test_bad_input.py has more mistakes."""
    imported = imported_by(words, code)
    assert "yacs" in imported  # the list was read
    assert not imported & {"torch", "numpy", "sklearn", "tensorboard"}
    assert (
        words in ("config keys", "config list") or "rich" not in imported
    )  # which draws the table


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, launcher; launcher.Task; launcher.CfgNode; sys.exit('torch' in sys.modules)"
    Job([sys.executable, "-c", code], {}, Path.cwd()).wait().ok()


@pytest.mark.parametrize("name", ["new", "new/er/still", "there"])
def test_a_writable_place_is_not_touched(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    check_writable(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["file", "file/run", "file/run/deeper", "/proc/run", "/proc/sys/a/b", "n" * 300]
)
def test_an_impossible_place_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="OUTPUT_DIR") as caught:
        check_writable(tmp_path / name)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert (tmp_path / "file").is_file()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="root alone changes its user")
@pytest.mark.parametrize("mode", [0o755, 0o700], ids=["not writable", "not readable"])
def test_a_place_of_another_user_is_told(mode: int) -> None:
    # pytest's own folders are closed to other users, so this one lies elsewhere.
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        os.chmod(place, mode)
        try:
            os.seteuid(65534)
            with pytest.raises(UsageError, match="OUTPUT_DIR"):
                check_writable(Path(place) / "run")
        finally:
            os.seteuid(0)
