"""The configs that ship: found by their names, and inside the wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launcher.config import ConfigError, load_config
from launcher.config.shipped import first_comment, shipped
from tests.system.jobs import ROOT

BUILD = "from setuptools import build_meta as b; import sys; print(getattr(b, sys.argv[1])('.'))"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_they_are_those_of_the_checkout_each_with_a_comment() -> None:
    assert {path.resolve() for path in shipped().values()} == {*ROOT.glob("configs/*.yaml")}
    assert all(first_comment(path) for path in shipped().values())


@pytest.mark.parametrize("name", ["digits_lenet", "digits_lenet.yaml"])
def test_a_name_stands_for_the_file_where_no_such_file_is_here(name: str) -> None:
    Path("digits_lenet").mkdir()  # a folder is no config
    config = load_config(name)
    assert config.cfg.OUTPUT_DIR == "runs/digits_lenet"
    assert config.cfg.TASK.MODEL == "lenet" and config.cfg.TRAIN.DURATION == "20ep"  # of its base
    assert config.origins["TASK.MODEL"] == f"{shipped()['digits_lenet']}:4"
    Path("digits_lenet").rmdir()
    Path(name).write_text("TASK: {NAME: sine}\nSEED: 5\n")
    assert load_config(name).origins["SEED"] == f"{name}:2"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "digit",
            "no such file, and no config of this name ships (see launcher config list) (did ",
        ),
        ("digit", "(did you mean digits?)"),
        ("configs/digits.yaml", "no such file (see launcher config list) (did you mean digits?)"),
        ("zzz.yaml", "and no config of this name ships (see launcher config list)"),
    ],
)
def test_what_is_neither_is_told(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(name)
    assert said in str(caught.value)


def test_a_base_is_a_path_never_a_name() -> None:
    Path("mine.yaml").write_text("_BASE_: digits\n")
    with pytest.raises(ConfigError, match=r"mine.yaml:1  _BASE_: digits: no such file$"):
        load_config("mine.yaml")


@pytest.mark.slow
def test_a_wheel_has_them_also_one_made_from_an_sdist(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77", reason="builds a wheel")
    # A copy: a build leaves folders behind.
    for name in ("configs", "launcher"):
        shutil.copytree(ROOT / name, name, symlinks=True, ignore=lambda *_: ["__pycache__"])
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, name)

    def made(what: str, folder: Path) -> Path:
        words = [sys.executable, "-c", BUILD, what]
        told = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
        return folder / told.stdout.splitlines()[-1]

    wheel = made("build_wheel", tmp_path)
    sdist = made("build_sdist", tmp_path)
    shutil.unpack_archive(sdist, "unpacked", filter="data")
    (source,) = Path("unpacked").iterdir()
    expected = {f"launcher/configs/{p.name}": p.read_bytes() for p in ROOT.glob("configs/*.yaml")}
    for made_of in (wheel, made("build_wheel", source.absolute())):
        with zipfile.ZipFile(made_of) as file:
            names = [name for name in file.namelist() if name.endswith(".yaml")]
            assert {name: file.read(name) for name in names} == expected
    shutil.unpack_archive(wheel, "site", "zip")
    command = [sys.executable, "-m", "launcher", "config", "keys", "--config-file", "sine"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    told = subprocess.run(
        command, cwd="unpacked", env=env, capture_output=True, text=True, check=True
    )
    assert str(tmp_path / "site/launcher/configs/sine.yaml") in told.stdout
