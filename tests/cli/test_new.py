"""`launcher new`: what it writes trains at once, passes its own test, and says nothing untrue."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launcher.cli.new import TEMPLATES
from tests.cli.launched import imported_by, run
from tests.system import jobs
from tests.system.jobs import slow

Captured = pytest.CaptureFixture[str]
STEMS = {"classification": "images", "lm": "text", "gan": "gan", "detection": "boxes"}
SHORT = ("TRAIN.DURATION", "6step", "LOG.EVERY", "2step", "EVAL.EVERY", "3step")
# The line of a config that states what it reaches: "# reaches val/accuracy > 0.9".
STATED = re.compile(r"^# reaches (\S+) ([<>]) ([\d.]+)", re.MULTILINE)
ONE_FAST = ["classification", *map(slow, ("lm", "gan", "detection"))]


def made(template: str) -> Path:
    """A project of this template in the working directory."""
    assert run(f"new mine --template {template}") == 0
    return Path("mine").absolute()


def written(template: str) -> set[str]:
    stem = STEMS[template]
    names = {f"{stem}.py", f"{stem}.yaml", f"test_{stem}.py", "README.md", "slurm.sbatch"}
    return {*names, ".gitignore"}


def environment(project: Path) -> dict[str, str]:
    """That of a user: the commands of the environment on the PATH, and of a Slurm of one task."""
    bin = project.parent / "bin"
    bin.mkdir()
    for name, command in {
        "sbatch": f'SLURM_JOB_ID={jobs.slurm_job()} exec bash "$@"',
        "srun": 'exec "$@"',
    }.items():
        options = 'while [ "${1#--}" != "$1" ]; do shift; done'
        (bin / name).write_text(f"#!/bin/sh\n{options}\n{command}\n")
        (bin / name).chmod(0o755)
    path = os.pathsep.join([str(bin), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("template", TEMPLATES)
def test_it_writes_all_that_a_project_needs(template: str, capsys: Captured) -> None:
    Path("mine").mkdir()  # an empty one may be there
    project = made(template)
    assert {path.name for path in project.iterdir()} == written(template)
    out = capsys.readouterr().out
    assert f"launcher train --config-file {STEMS[template]}.yaml" in out
    job = (jobs.ROOT / "tools/slurm.sbatch").read_bytes()
    assert (project / "slurm.sbatch").read_bytes() == job
    # Each is a model of a task: nothing but the launcher asks for ranks and devices.
    # Nor does it name a place of the machine that it was written on.
    places = [p for p in (jobs.ROOT, jobs.ROOT.parent) if p not in (Path("/"), Path("/usr"))]
    names = "|".join(re.escape(f"{place}/") for place in [*places, Path("/tmp")])
    asks = r"torch\.distributed|\.set_epoch\(|\.cuda\(|is_main|barrier\("
    own = re.compile(f"{asks}|{names}")
    assert not [p.name for p in project.iterdir() if own.search(p.read_text())]


def test_the_first_template_is_the_default() -> None:
    assert run("new deep/er/mine") == 0
    assert {path.name for path in Path("deep/er/mine").iterdir()} == written("classification")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("new full", "full is not empty (notes.txt); name a new directory"),
        ("new hidden", "hidden is not empty (.git)"),
        ("new full/notes.txt", "full/notes.txt is a file"),
        ("new full/notes.txt/deeper", "cannot be written: Not a directory"),
        (f"new {'n' * 300}", "cannot be written: File name too long"),
        ("new mine --template vae", "choose from"),
        ("new", "required: DIR"),
    ],
)
def test_what_is_refused_is_left_alone(words: str, told: str, capsys: Captured) -> None:
    Path("hidden/.git").mkdir(parents=True)
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    with jobs.unchanged(Path.cwd()):
        assert run(words) == 2
    assert told in capsys.readouterr().err


def test_it_answers_without_torch() -> None:
    assert not imported_by("new mine --template gan") & {"torch", "numpy", "tensorboard"}
    assert Path("mine/gan.py").exists()


@pytest.mark.parametrize(
    ("template", "ranks"),
    [("classification", 2), slow("classification", 1)]
    + [slow(name, ranks) for name in ("lm", "gan", "detection") for ranks in (1, 2)],
)
def test_it_trains(template: str, ranks: int) -> None:
    project = made(template)
    words = ["train", "--config-file", f"{STEMS[template]}.yaml", *SHORT, "OPTIM.WARMUP", ""]
    with jobs.Group(words, ranks, {"OMP_NUM_THREADS": "1"}, project) as job:
        job.wait().ok()
    records = jobs.metrics(project / "runs" / STEMS[template])
    trained = [r for r in records if any(key.startswith("train/loss") for key in r)]
    assert [r["step"] for r in trained] == [2, 4, 6]
    metric = stated(project)[0]
    assert all(math.isfinite(r[metric]) for r in records if r["step"] in (3, 6) and metric in r)
    assert any(metric in r for r in records) and not any("nonfinite" in r for r in records)


@pytest.mark.parametrize("template", ONE_FAST)
def test_its_own_test_passes(template: str) -> None:
    project = made(template)
    command = [sys.executable, "-m", "pytest", "-q"]
    with jobs.Job(command, environment(project), project) as job:
        assert " passed" in job.wait().ok().out


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("template", TEMPLATES)
def test_its_readme_is_true(template: str) -> None:
    """Every command that it shows, in that order, and what the config states to be reached."""
    project = made(template)
    env = environment(project)
    text = (project / "README.md").read_text()
    commands = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    assert {command.split()[0] for command in commands} >= {"launcher", "torchrun", "sbatch"}
    for command in commands:
        with jobs.Job(["bash", "-c", command], env, project) as job:
            job.wait(400).ok()
    stem = STEMS[template]
    for name in (stem, "two", "other", "slurm"):
        assert jobs.status(project / "runs" / name)["state"] == "completed"
    metric, sign, bound = stated(project)
    for name in (stem, "two"):
        *_, reached = jobs.values(project / "runs" / name, metric).values()
        assert reached > bound if sign == ">" else reached < bound
    # Files that it names are there, and the other way round.
    named = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)) | {"README.md", ".gitignore"}
    assert named == written(template)


def stated(project: Path) -> tuple[str, str, float]:
    (config,) = project.glob("*.yaml")
    ((metric, sign, bound),) = STATED.findall(config.read_text())
    return metric, sign, float(bound)


@pytest.mark.slow
def test_the_wheel_has_the_templates(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(jobs.ROOT / "launcher", source / "launcher", ignore=skip)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(jobs.ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", tmp_path, source], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")
    for template in TEMPLATES:
        command = [sys.executable, "-m", "launcher", "new", template, "--template", template]
        env = {"PYTHONPATH": str(tmp_path / "installed")}
        with jobs.Job(command, env, tmp_path) as job:
            job.wait().ok()
        assert {path.name for path in (tmp_path / template).iterdir()} == written(template)
