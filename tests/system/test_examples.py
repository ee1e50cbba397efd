"""The examples: each trains on 1 and 2 ranks, reaches what it states, and is exact over a kill."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli import main
from tests.edges.test_zoo import same
from tests.system import jobs
from tests.system.exact import records

EXAMPLES = jobs.ROOT / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.yaml"))
# How long it takes until all that a resume may get wrong has happened, where that is not the end.
ENOUGH = {
    "dcgan": "9ep",
    "distillation": "18ep",
    "images": "9ep",
    "moco": "4ep",
    "nanogpt": "250step",
    "simclr": "4ep",
    "timm_recipe": "4ep",
    "vae": "12ep",
    "word_language_model": "4ep",
}
# The line of a config's comment that states what it reaches: "# reaches val/accuracy > 0.9".
STATED = re.compile(r"^# reaches (\S+) ([<>]) (\S+)$", re.MULTILINE)


def config(name: str) -> Path:
    return EXAMPLES / f"{name}.yaml"


def begin(name: str, run: Path, ranks: int, *more: object) -> jobs.Running:
    words = ["train", "--config-file", config(name), "OUTPUT_DIR", run, *more]
    env = {"OMP_NUM_THREADS": "1"}
    return jobs.Group(words, ranks, env) if ranks > 1 else jobs.Forked(words, env)


def needs(name: str) -> None:
    """Skip an example whose packages are not here."""
    text = (EXAMPLES / f"{name}.py").read_text()
    for module in re.findall(r"^\s*(?:import|from) (transformers|pycocotools)\b", text, re.M):
        pytest.importorskip(module)


# Long ones: a quarter of a minute and more each; `make test` only sees that they train.
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_reaches_what_it_states_also_over_a_kill(name: str, ranks: int, tmp_path: Path) -> None:
    needs(name)
    run = tmp_path / "run"
    with begin(name, run, ranks) as job:
        job.until(lambda: jobs.checkpoint_steps(run), "a checkpoint")
        job.kill()
    assert jobs.status(run)["state"] == "running"  # it was killed on the way
    with begin(name, run, ranks, "--resume") as job:
        job.wait(1500).ok()
    assert_reached(name, run)


# Of phases and of outputs one; the others train to their ends among the long tests.
SHORT = ("distillation", "detection")


@pytest.mark.parametrize("name", [n if n in SHORT else jobs.slow(n) for n in NAMES])
def test_it_trains(name: str, tmp_path: Path) -> None:
    needs(name)
    short = ("TRAIN.DURATION", "6step", "LOG.EVERY", "2step", "EVAL.EVERY", "3step")
    with begin(name, tmp_path / "run", 1, *short, "OPTIM.WARMUP", "", "EVAL.SAMPLES", "64") as job:
        job.wait().ok()
    records = jobs.metrics(tmp_path / "run")
    trained = [r for r in records if any(key.startswith("train/loss") for key in r)]
    assert [r["step"] for r in trained] == [2, 4, 6]
    assert not any("nonfinite" in record for record in records)


def assert_reached(name: str, run: Path) -> None:
    metric, sign, bound = STATED.findall(config(name).read_text())[0]
    reached = list(jobs.values(run, metric).values())[-1]
    assert reached > float(bound) if sign == ">" else reached < float(bound)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_exactly_where_it_was_killed(name: str, ranks: int, tmp_path: Path) -> None:
    """Of shorter runs, which see two saves, and of a thaw and milestones the steps after."""
    needs(name)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = ("TRAIN.DURATION", ENOUGH[name]) if name in ENOUGH else ()
    with begin(name, whole, ranks, *words) as job:
        job.wait(1500).ok()
    steps = jobs.checkpoint_steps(whole)
    with begin(name, broken, ranks, *words) as job:
        jobs.wait_for_save(broken, _first_save(whole), job)
        job.kill()
    assert jobs.status(broken)["state"] == "running"
    with begin(name, broken, ranks, *words, "--resume") as job:
        job.wait(1500).ok()
    assert records(broken) == records(whole) and jobs.checkpoint_steps(broken) == steps
    ours, theirs = jobs.state(broken), jobs.state(whole)
    for part in ("model", "optimizer", "ema", "progress"):
        assert same(ours[part], theirs[part]), part
    pairs = zip(ours["ranks"], theirs["ranks"], strict=True)
    assert all(same(a[part], b[part]) for a, b in pairs for part in ("task", "buffers", "random"))


def _first_save(run: Path) -> int:
    """The step of a run's first save that is not its last."""
    return jobs.history(run, "checkpoint")[0]["step"]


@pytest.mark.parametrize("name", NAMES)
def test_its_config_is_without_mistakes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert STATED.search(config(name).read_text()), f"{name}.yaml does not state what it reaches"
    assert main(["train", "--config-file", str(config(name)), "--check"]) == 0
    task, _, _ = yaml.safe_load(capsys.readouterr().out)["TASK"]["NAME"].rpartition(":")
    assert Path(task).name == f"{name}.py"


def test_no_example_works_around_the_launcher() -> None:
    own = re.compile(r"torch\.distributed|\bdist\.|\.set_epoch\(|\.cuda\(|is_main|barrier\(")
    found: Any = {
        path.name: match[0]
        for path in EXAMPLES.glob("*.py")
        for match in own.finditer(path.read_text())
    }
    assert found == {}
