"""Bad input: one clear message that says what to do, exit code 2, and nothing left behind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.system.exact import COMMON
from tests.system.jobs import (
    DIGITS,
    TASKS,
    Ended,
    free_port,
    slow,
    train,
    unchanged,
    without_torch,
)

FILES = {
    "broken.yaml": "TASK:\n  NAME: digits\nTRAIN: {BATCH_SIZE: 8\nSEED: 1\n",
    "two.yaml": "TASK:\n  NAME: digits\nOPTIM:\n  LRR: 0.1\nTRAIN:\n  BATCH_SIZE: many\n",
    "loop.yaml": "_BASE_: loop.yaml\n",
    "code.yaml": "SEED: !!python/object/apply:os.getpid []\n",
    "syntax.py": "import os\ndef f(:\n",
    "other.py": "from launcher import Task\nclass Other(Task):\n    pass\n",
    "file": "a regular file\n",
}
ASKING = Path(__file__).with_name("asking.py")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the wrong files in it. Nothing may come to it."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # as Python would, beside a task
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    with unchanged(tmp_path):
        yield tmp_path


def config(name: str, *words: str) -> list[str]:
    return ["--config-file", name, *words]


def digits(*words: str) -> list[str]:
    return config(str(DIGITS), *words)


def task(name: str) -> list[str]:
    return ["TASK.NAME", name]


def noted(*words: str) -> list[str]:
    return [*task(f"{TASKS}:Noted"), *words]


def callback(entry: str) -> list[str]:
    return [*COMMON, "CALLBACKS", f"['{entry}']"]


def mistake(name: str, words: list[str], *told: str, **env: str) -> Any:
    """Words of a command line, and patterns of what the message must hold."""
    return pytest.param(words, told, env, id=name)


RANK_0 = {"RANK": "0", "LOCAL_RANK": "0"}
TWO = mistake(
    "two mistakes in one report",
    config("two.yaml", "OPTIM.SCHEDULE=cosin", "TASK.MODL", "x"),
    "3 mistakes|4 mistakes",
    r"two\.yaml:4 +OPTIM\.LRR: unknown key \(did you mean OPTIM\.LR\?\)",
    r"two\.yaml:6 +TRAIN\.BATCH_SIZE: .*'many'",
    r"command line +OPTIM\.SCHEDULE: 'cosin'.*\(did you mean cosine\?\)",
)
BELOW = digits("OUTPUT_DIR", "file/deep/run")
UNWRITABLE = mistake(
    "run directory below a file", BELOW, "OUTPUT_DIR", "file/deep/run", "is a file"
)
WITHOUT_TORCH = [
    mistake("missing config file", config("none.yaml"), r"none\.yaml"),
    mistake("broken YAML", config("broken.yaml"), r"broken\.yaml:[34]"),
    mistake("a base that is itself", config("loop.yaml"), r"loop\.yaml", "_BASE_"),
    mistake("a Python tag", config("code.yaml"), r"code\.yaml:1"),
    mistake("no config at all", [], r"TASK\.NAME", "digits"),
    mistake("unknown option", digits("--resum"), "--resum"),
    mistake("a key without a value", digits("OPTIM.LR"), r"OPTIM\.LR"),
    mistake("unknown task", task("digit"), "'digit'", "did you mean digits"),
    mistake("syntax error", task("syntax.py:A"), "syntax error", r"syntax\.py:2"),
    mistake("no such class", task("other.py:Othr"), "Othr", "did you mean Other"),
    mistake("an unknown metric", digits("CHECKPOINT.METRIC", "val/acc"), "val/accuracy"),
    TWO,
    UNWRITABLE,
    mistake("run directory is a file", digits("OUTPUT_DIR", "file"), "OUTPUT_DIR", "is a file"),
    mistake("no RANK", digits(), "RANK|LOCAL_RANK", "torchrun", WORLD_SIZE="2"),
    mistake("odd WORLD_SIZE", digits(), "WORLD_SIZE='two'", WORLD_SIZE="two", **RANK_0),
    mistake(
        "ranks on a node that are more than there are",
        digits(),
        *("LOCAL_WORLD_SIZE=4", "WORLD_SIZE=2", "torchrun"),
        **RANK_0,
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="4",
    ),
]
NO_SAMPLES = noted("TASK.TRAIN_SAMPLES", "0")
EMPTY = mistake("empty data set", NO_SAMPLES, r"build_dataset\('train'\)", "empty")
LARGE = noted("TRAIN.DROP_LAST", "True", "TRAIN.BATCH_SIZE", "36")
SHORT = digits("DIST.INIT_TIMEOUT", "5s")
WITH_TORCH = [
    EMPTY,
    mistake("empty split", noted("TASK.VAL_SAMPLES", "0"), r"build_dataset\('val'\)", "empty"),
    mistake(
        "less than a batch", LARGE, "35 samples", r"TRAIN\.DROP_LAST False", r"TRAIN\.BATCH_SIZE"
    ),
    mistake("no rendezvous", SHORT, "MASTER_ADDR|rendezvous|torchrun", WORLD_SIZE="2", **RANK_0),
    mistake(
        "no such callback class",
        callback(f"{ASKING}:Ask after=3"),
        r"has no class Ask \(did you mean Asks\?\)",
    ),
    mistake(
        "a callback without an argument",
        callback(f"{ASKING}:Asks after=3"),
        "missing a required argument: 'request'",
    ),
    mistake(
        "an argument without a value",
        callback(f"{ASKING}:Asks request"),
        "is not a name with key=value arguments",
    ),
    mistake("unknown callback", callback("early"), "there is no callback 'early'"),
    mistake("no callback file", callback("no.py:Asks"), r"there is no callback file no\.py"),
]
mistakes = partial(pytest.mark.parametrize, ("words", "told", "env"))
Told = tuple[str, ...]


def assert_told(ended: Ended, told: Told, code: int = 2) -> None:
    assert ended.code == code and "Traceback" not in ended.output
    for pattern in told:
        assert re.search(pattern, ended.err)


@mistakes(WITHOUT_TORCH)
def test_a_mistake_that_is_told_without_torch(
    words: list[str], told: Told, env: dict[str, str], here: Path, tmp_path_factory: Any
) -> None:
    poison = tmp_path_factory.mktemp("path") / "poison"
    assert_told(train(*words, env=env | without_torch(poison), cwd=here, cold=True), told)
    assert not (poison / "imported").exists()


@mistakes(WITH_TORCH)
def test_a_mistake_that_shows_only_with_torch(
    words: list[str], told: Told, env: dict[str, str], here: Path
) -> None:
    assert_told(train(*words, env=env, cwd=here), told)


def test_a_rank_that_never_comes(here: Path) -> None:
    """It may come another time, so the exit code lets job files and torchrun try again."""
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    env = {"WORLD_SIZE": "2", **RANK_0, **place}
    ended = train(*digits("DIST.INIT_TIMEOUT", "3s"), env=env, cwd=here)
    assert_told(ended, (r"DIST\.INIT_TIMEOUT", "rank 0 of 2"), code=1)


@mistakes([TWO, EMPTY, slow(*UNWRITABLE.values, id=UNWRITABLE.id)])
def test_a_mistake_under_torchrun(
    words: list[str], told: Told, env: dict[str, str], here: Path
) -> None:
    """Contract, section 2: only rank 0 tells it; no rank hangs; no half-made run directory."""
    ended = train(*words, ranks=2, env=env, cwd=here, cold=True)
    assert ended.code == 1  # torchrun's own, whatever the workers' codes
    for pattern in told:
        lines = [line for line in ended.output.splitlines() if re.search(pattern, line)]
        assert len(lines) == 1
    # torchrun always shows its own traceback; none of ours.
    assert ended.output.count("Traceback") == 1
    assert "launcher/cli/" not in ended.output and "launcher/engine/" not in ended.output
