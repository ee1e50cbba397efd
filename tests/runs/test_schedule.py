"""The course of rates from a config alone is the one that the run then records."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from launcher.errors import UsageError
from launcher.runs.schedule import curves
from tests.cli.launched import run
from tests.system import jobs

CONFIG = """
TASK: {NAME: sine}
TRAIN: {DURATION: 2ep, BATCH_SIZE: 2000}
OPTIM: {LR: 0.01, SCHEDULE: cosine, WARMUP: 3step, PERIOD: 4step, LR_SCALING: sqrt, LR_BATCH: 500}
LOG: {EVERY: 1step}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG)
    return "c.yaml"


def test_it_is_what_the_run_records(config: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    jobs.launch("train", "--config-file", tmp_path / config, "OUTPUT_DIR", run).ok()
    recorded = jobs.values(run, "train/lr")
    length = jobs.environment(run)["lengths"]["train"]
    steps, rates = curves(config, [], length)["train/lr"]
    assert recorded == dict(zip(steps.tolist(), rates.tolist(), strict=True))
    assert len({*recorded.values()}) > 5 and max(recorded.values()) == 0.02


def test_what_else_has_a_course_is_there_too_and_long_ones_are_thinned(config: str) -> None:
    words = ["OPTIM.NAME=adam", "OPTIM.MOMENTUM_SCHEDULE", "linear", "OPTIM.MOMENTUM_FACTOR=0.5"]
    words += ["OPTIM.WEIGHT_DECAY=0.1", "OPTIM.WEIGHT_DECAY_SCHEDULE=linear"]
    words += ["OPTIM.WEIGHT_DECAY_FACTOR=3", "TRAIN.DURATION=1000003step"]
    found = curves(config, words, None)
    assert list(found) == ["train/lr", "momentum", "weight_decay"]
    for name, first, last in (("momentum", 0.9, 0.45), ("weight_decay", 0.1, 0.3)):
        steps, values = found[name]
        assert steps[0] == 1 and steps[-1] == 1000003 and len(steps) <= 2000
        assert (values[0], values[-1]) == pytest.approx((first, last), rel=1e-5)
        assert np.all(np.diff(steps) > 0)


def test_epochs_need_the_length_of_the_data(config: str) -> None:
    with pytest.raises(UsageError, match=r"^TRAIN\.DURATION count epochs: .*--length N"):
        curves(config, [], None)
    ends = [curves(config, more, 9000)["train/lr"][0][-1] for more in ([], ["TRAIN.DROP_LAST=1"])]
    assert ends == [10, 8]


def test_in_the_terminal_and_as_a_picture(config: str, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    words = "OPTIM.SCHEDULE onecycle OPTIM.MOMENTUM_SCHEDULE=onecycle OPTIM.MOMENTUM_FACTOR=0.9"
    assert run(f"runs plot --schedule {config} {words} --length 90000 -o s.svg") == 0
    out = capsys.readouterr().out
    assert "train/lr  0.0002 at first" in out and "momentum  0.9 at first" in out
    assert "step 90" in out and "⠉" in out and "own schedule or optimiser is not asked" in out
    told = "".join(ElementTree.parse("s.svg").getroot().itertext())
    assert "train/lr" in told and "momentum" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "plot needs runs and -o FILE.png, or --schedule CONFIG"),
        ("some/run", "plot needs runs and -o FILE.png"),
        ("some/run --schedule c.yaml", "not both"),
        ("--schedule c.yaml OPTIM.SCHEDUL=step", "did you mean OPTIM.SCHEDULE?"),
        ("--schedule c.yaml --length 9 -o s.gif", "must end in .png or .svg"),
        ("--schedule none.yaml", "none.yaml"),
    ],
)
def test_mistakes(words: str, told: str, config: str, capsys: pytest.CaptureFixture) -> None:
    assert run(f"runs plot {words}") == 2
    assert told in capsys.readouterr().err


def test_it_needs_no_torch(config: str, tmp_path: Path) -> None:
    words = ["-m", "launcher", "runs", "plot", "--schedule", config, "--length", "9000"]
    env = jobs.clean_environment(jobs.without_torch(tmp_path / "poison"))
    env["PYTHONPATH"] += f":{jobs.ROOT}"
    ended = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "poison/imported").exists()
