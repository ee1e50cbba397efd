"""The command: help, exit codes, refusals, and what answers without importing torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from launcher import __version__, cli
from launcher.errors import RunError, UsageError
from tests.cli.imports import ROOT, imported_by

CONFIG = str(ROOT / "configs" / "digits.yaml")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No launcher's variables, and no run directory in the checkout."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("argv", [["--help"], ["-h"], []])
def test_help_lists_the_commands(argv: list[str], capsys: Captured) -> None:
    assert cli.main(argv) == (0 if argv else 2)
    out = capsys.readouterr().out
    assert out.startswith("usage: launcher COMMAND")
    assert all(f"  {name}" in out for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"launcher {command}" in capsys.readouterr().out


def test_version(capsys: Captured) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"launcher {__version__}\n"


@pytest.mark.parametrize(("name", "hint"), [("trian", " (did you mean train?)"), ("zzz", "")])
def test_an_unknown_command(name: str, hint: str, capsys: Captured) -> None:
    assert cli.main([name]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        f"launcher: there is no command {name!r}{hint}; see launcher --help\n",
    )


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

    def command(argv: list[str]) -> int:
        raise kind("mend this")

    assert cli.call(command, []) == code
    prefix = "launcher: rank 3" if rank == "3" else "launcher"
    assert capsys.readouterr().err == f"{prefix}: mend this\n"
    assert waited == ([cli.GRACE_S] if rank == "3" else [])


def test_check_prints_the_config_and_makes_nothing(tmp_path: Path, capsys: Captured) -> None:
    """Overrides in any order and both forms; the last one wins."""
    words = ["OPTIM.LR=1", "--check", "TRAIN.DURATION", "5ep", "--config-file", CONFIG]
    assert cli.main(["train", *words, "OPTIM.LR", "1e-3", "TRAIN.DURATION=20ep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"  LR: 0.001", "  DURATION: 20ep", "OUTPUT_DIR: runs/digits"} <= set(lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", ["--help", "train --help", f"train --config-file {CONFIG} --check", "config keys"]
)
def test_answers_without_torch(tmp_path: Path, words: str) -> None:
    """tests/system/test_bad_input.py has the mistakes."""
    imported = imported_by(words.split(), 0, tmp_path)
    assert "yacs" in imported  # the list was read
    assert not imported & {"torch", "numpy", "sklearn", "tensorboard"}


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, launcher; launcher.Task; launcher.CfgNode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
