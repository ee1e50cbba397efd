"""Bad input: one clear message that says what to do, exit code 2, and nothing left behind."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.system.forked import launch
from tests.system.jobs import (
    DIGITS,
    TASKS,
    free_port,
    history,
    snapshot,
    status,
    train,
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


@dataclass(frozen=True)
class Mistake:
    """A command line with a mistake in it, and what the message must hold."""

    name: str
    words: list[str]
    told: list[str]
    env: dict[str, str] = field(default_factory=dict)
    needs_torch: bool = False  # it shows only once the data sets are built
    code: int = 2

    def __str__(self) -> str:
        return self.name


def digits(*words: str) -> list[str]:
    return ["--config-file", str(DIGITS), *words]


def noted(*words: str) -> list[str]:
    return ["TASK.NAME", f"{TASKS}:Noted", *words]


RANK_0 = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
EMPTY = Mistake(
    "empty data set",
    noted("TASK.TRAIN_SAMPLES", "0"),
    [r"build_dataset\('train'\)", "empty"],
    needs_torch=True,
)
UNWRITABLE = Mistake(
    "run directory below a file",
    digits("OUTPUT_DIR", "file/deep/run"),
    ["OUTPUT_DIR", "file/deep/run", "is a file"],
)
TWO = Mistake(
    "two mistakes in one report",
    ["--config-file", "two.yaml", "OPTIM.SCHEDULE=cosin", "TASK.MODL", "x"],
    [
        "3 mistakes|4 mistakes",
        r"two\.yaml:4 +OPTIM\.LRR: unknown key \(did you mean OPTIM\.LR\?\)",
        r"two\.yaml:6 +TRAIN\.BATCH_SIZE: .*'many'",
        r"command line +OPTIM\.SCHEDULE: 'cosin'.*\(did you mean cosine\?\)",
    ],
)
MISTAKES = [
    Mistake("missing config file", ["--config-file", "none.yaml"], [r"none\.yaml"]),
    Mistake("broken YAML", ["--config-file", "broken.yaml"], [r"broken\.yaml:[34]"]),
    Mistake("a base that is itself", ["--config-file", "loop.yaml"], [r"loop\.yaml", "_BASE_"]),
    Mistake("a Python tag", ["--config-file", "code.yaml"], [r"code\.yaml:1"]),
    Mistake("no config at all", [], [r"TASK\.NAME", "digits"]),
    Mistake("unknown option", digits("--resum"), ["--resum"]),
    Mistake("a key without a value", digits("OPTIM.LR"), [r"OPTIM\.LR"]),
    Mistake("unknown task", ["TASK.NAME", "digit"], ["'digit'", "did you mean digits"]),
    Mistake("syntax error", ["TASK.NAME", "syntax.py:A"], ["syntax error", r"syntax\.py:2"]),
    Mistake("no such class", ["TASK.NAME", "other.py:Othr"], ["Othr", "did you mean Other"]),
    Mistake("an unknown metric", digits("CHECKPOINT.METRIC", "val/acc"), ["val/accuracy"]),
    TWO,
    UNWRITABLE,
    Mistake("run directory is a file", digits("OUTPUT_DIR", "file"), ["OUTPUT_DIR", "is a file"]),
    EMPTY,
    Mistake(
        "empty split",
        noted("TASK.VAL_SAMPLES", "0"),
        [r"build_dataset\('val'\)", "empty"],
        needs_torch=True,
    ),
    Mistake(
        "split smaller than one batch",
        noted("TRAIN.DROP_LAST", "True", "TRAIN.BATCH_SIZE", "36"),
        ["35 samples", r"TRAIN\.DROP_LAST False", r"TRAIN\.BATCH_SIZE"],
        needs_torch=True,
    ),
    Mistake(
        "WORLD_SIZE without the rest",
        digits(),
        ["RANK|LOCAL_RANK", "torchrun"],
        env={"WORLD_SIZE": "2"},
    ),
    Mistake(
        "WORLD_SIZE that is no number",
        digits(),
        ["WORLD_SIZE='two'"],
        env=RANK_0 | {"WORLD_SIZE": "two"},
    ),
    Mistake(
        "ranks on a node that are more than there are",
        digits(),
        ["LOCAL_WORLD_SIZE=4", "WORLD_SIZE=2", "torchrun"],
        env=RANK_0 | {"LOCAL_WORLD_SIZE": "4"},
    ),
    Mistake(
        "no rendezvous address",
        digits("DIST.INIT_TIMEOUT", "5s"),
        ["MASTER_ADDR|rendezvous|torchrun"],
        env=RANK_0,
        needs_torch=True,
    ),
    Mistake(
        "a rank that never comes",
        digits("DIST.INIT_TIMEOUT", "3s"),
        [r"DIST\.INIT_TIMEOUT", "rank 0 of 2"],
        env=RANK_0 | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())},
        needs_torch=True,
        code=1,  # it may come another time, so job files and torchrun may try again
    ),
]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A working directory with the wrong files in it."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake(mistake: Mistake, here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Issue 2, "Bad input": exit 2, one message, no traceback, no half-made run directory; and a
    mistake that can be seen without torch is told without torch."""
    poison = tmp_path_factory.mktemp("path") / "poison"
    before = snapshot(here)
    if mistake.needs_torch:
        ended = launch("train", *mistake.words, cwd=here, **mistake.env)
    else:
        ended = train(*mistake.words, env=mistake.env | without_torch(poison), cwd=here)
    assert ended.code == mistake.code
    assert "Traceback" not in ended.output
    for pattern in mistake.told:
        assert re.search(pattern, ended.err)
    assert not (poison / "imported").exists()
    assert snapshot(here) == before


@pytest.mark.parametrize("mistake", [TWO, EMPTY, UNWRITABLE], ids=str)
def test_a_mistake_under_torchrun(mistake: Mistake, here: Path) -> None:
    """Contract, section 2: only rank 0 tells it; no rank hangs; no half-made run directory."""
    before = snapshot(here)
    ended = train(*mistake.words, ranks=2, cwd=here)
    assert ended.code == 1  # torchrun's own, whatever the workers' codes
    for pattern in mistake.told:
        lines = [line for line in ended.output.splitlines() if re.search(pattern, line)]
        assert len(lines) == 1
    # torchrun always shows its own traceback; none of ours.
    assert ended.output.count("Traceback") == 1
    assert "launcher/cli/" not in ended.output and "launcher/engine/" not in ended.output
    assert snapshot(here) == before


FAILING = ("TASK.NAME", f"{TASKS}:Noted", "TRAIN.DURATION", "9step", "OUTPUT_DIR")


def test_an_exception_on_rank_1(tmp_path: Path) -> None:
    """Item 7: the traceback of a rank other than 0 is on the console with its rank, the job ends,
    and the run directory says that it failed."""
    run = tmp_path / "run"
    ended = train(*FAILING, run, ranks=2, env={"LAUNCHER_TEST_FAIL_RANK": "1"})
    assert ended.code == 1
    assert re.search(r"rank 1 on \S+ failed first, .*: ValueError: a planned failure", ended.err)
    assert "in train_step" in ended.err
    first, second = ((run / f"logs/rank{rank}.log").read_text() for rank in range(2))
    assert "ValueError: a planned failure" in second and "in train_step" in second
    # Where rank 0 lives long enough it names what it has died of, but the traceback is rank 1's.
    line = 'raise ValueError("a planned failure")'
    assert line in second and line not in first
    assert (status(run)["state"], status(run)["step"]) == ("failed", 2)
    assert history(run)[-1]["event"] == "failure"


def test_an_exception_in_one_process(tmp_path: Path) -> None:
    """Contract, section 1: anything else than bad usage is exit code 1, with the traceback."""
    run = tmp_path / "run"
    ended = launch("train", *FAILING, run, LAUNCHER_TEST_FAIL_RANK="0")
    assert ended.code == 1
    assert ended.output.count("ValueError: a planned failure") == 1
    assert "ValueError: a planned failure" in (run / "logs/rank0.log").read_text()
    assert status(run)["state"] == "failed" and "planned failure" in status(run)["reason"]
    assert history(run)[-1]["event"] == "failure"
