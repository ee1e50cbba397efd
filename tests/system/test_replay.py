"""A step of a run once more: the same bits, as many ranks; what is looked at; nothing changed."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.system import jobs
from tests.system.exact import COMMON, TASK
from tests.system.jobs import slow
from tests.system.terminal import Terminal

# Dropout, augmentation and workers, a kill on the way, batches that ranks do not share evenly.
WORDS = [*COMMON, "LOG.DIGEST", "1step", "CHECKPOINT.KEEP_EVERY", "4step", "TRAIN.DURATION", "8ep"]
RANKS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three ranks that was killed once."""
    run = tmp_path_factory.mktemp("replay") / "run"
    words = ["train", *WORDS, "OUTPUT_DIR", run, "TRAIN.MICRO_BATCH_SIZE", "2"]
    with jobs.Group(words, RANKS) as job:
        jobs.wait_for_save(run, 8, job)
        job.kill()
    with jobs.Group([*words, "--resume"], RANKS) as job:
        job.wait().ok()
    return run


def replay(run: Path, step: int, *more: object) -> jobs.Ended:
    with jobs.unchanged(run):
        return jobs.launch("replay", run, "--step", step, *more)


def proved(ended: jobs.Ended) -> list[int]:
    """The steps at which the digests were equal."""
    found = re.search(r"digests at steps \[(.*)\]", ended.out)
    assert found, ended.output
    return [int(step) for step in found[1].split(",")]


@pytest.mark.parametrize("part", [slow(range(2)), *(slow(range(i, 50, 6)) for i in range(2, 8))])
def test_any_step_is_the_same_once_more(run: Path, part: range) -> None:
    """Fifty steps drawn at random, of which these rows each take some."""
    steps, draw = max(jobs.values(run, "digest")), random.Random(50)
    drawn = draw.sample(range(1, steps + 1), 50)
    for step in sorted(drawn[place] for place in part):
        ended = replay(run, step, "--rank", draw.randrange(RANKS)).ok()
        kept = [0, *(saved for saved in jobs.checkpoint_steps(run) if saved < step)]
        assert proved(ended)[-1] == step, ended.output
        assert proved(ended)[0] in (0, max(kept) + 1), "a checkpoint just before the step is kept"
        assert f"on {RANKS} ranks" in ended.out
        same = re.search(r"the same: (\d+) recorded values", ended.out)
        assert same and int(same[1]) >= len(proved(ended))


@pytest.mark.slow
def test_what_differs_is_said_with_the_first_step(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other, symlinks=True)
    text = (other / "config.yaml").read_text()
    assert "MOMENTUM: 0.9\n" in text
    (other / "config.yaml").write_text(text.replace("MOMENTUM: 0.9\n", "MOMENTUM: 0.91\n"))
    ended = replay(other, 7)
    assert (
        ended.code == 2 and "OPTIM.MOMENTUM" in ended.err
    )  # not what the checkpoint was made with
    records = other / "metrics.jsonl"
    digest = jobs.values(run, "digest")[6]
    records.write_text(records.read_text().replace(str(digest), str(digest ^ 1)))
    shutil.copy(run / "config.yaml", other / "config.yaml")
    ended = replay(other, 7)
    assert ended.code == 1 and "the weights differ at step 6, equal at step 5" in ended.out


@pytest.mark.parametrize(
    ("step", "more", "told"),
    [
        (0, (), "has done the steps 1 to"),
        (9999, (), "--step 9999 is none of them"),
        (3, ("--rank", "3"), "the run had ranks 0 to 2"),
    ],
)
def test_what_cannot_be_is_refused(run: Path, step: int, more: Any, told: str) -> None:
    ended = replay(run, step, *more)
    assert ended.code == 2 and told in ended.err


@pytest.mark.slow
def test_stats_are_those_of_the_step(run: Path) -> None:
    """Of the weights before the step, taken from the checkpoint that it begins from."""
    ended = replay(run, 9, "--rank", "2", "--stats").ok()
    weights = jobs.state(run, 8)["model"]
    for name, value in weights.items():
        if name.endswith("weight"):
            least, greatest = f"{value.min().item():.4g}", f"{value.max().item():.4g}"
            assert re.search(
                rf"weight weight .* {re.escape(least)} +{re.escape(greatest)}", ended.out
            )
    assert "gradient weight" in ended.out and "output" in ended.out


def test_the_debugger_stops_in_the_step_of_that_rank(run: Path) -> None:
    listed = jobs.metrics(run)
    with jobs.unchanged(run), Terminal("replay", run, "--step", 9, "--rank", 1, "--pdb") as shell:
        shell.until("(Pdb) ")
        shell.type("p indices, sorted(optimizer.param_groups[0])[0], type(model).__name__")
        assert re.search(r"\(\[\d+, \d+\], '\w+', '\w+'\)", shell.until("(Pdb) "))
        shell.type("p next(model.parameters()).flatten()[0].item()")
        told = shell.until("(Pdb) ")
        shell.type("s")
        shell.until("(Pdb) ")
        shell.type("w")
        assert f"{TASK.name}" in shell.until("(Pdb) ")
        shell.type("import pdb; pdb.Pdb.set_trace = lambda *_: None")
        shell.until("(Pdb) ")
        shell.type("c")
        assert shell.end() == 0, shell.seen
        assert "the same" in shell.seen and "digests at steps [9]" in shell.seen
    saved = next(iter(jobs.state(run, 8)["model"].values()))
    assert repr(saved.flatten()[0].item()) in told  # before the step, and of this run
    assert listed == jobs.metrics(run)


@pytest.mark.slow
def test_a_run_on_another_number_of_ranks_is_replayed_on_its_own(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other, symlinks=True)
    last = max(jobs.values(run, "digest"))
    words = ["train", *WORDS, "OUTPUT_DIR", other, "TRAIN.MICRO_BATCH_SIZE", "2", "--resume"]
    words += ["TRAIN.DURATION", "9ep", "--allow", "TRAIN.DURATION"]
    with jobs.Group(words, 2) as job:
        job.wait().ok()
    ended = replay(other, last + 2).ok()
    assert "on 2 ranks" in ended.out and proved(ended)[-1] == last + 2
    ended = replay(other, last - 1).ok()
    assert "on 3 ranks" in ended.out


def test_a_step_that_went_wrong_is_looked_at_to_its_end(tmp_path: Path) -> None:
    """One that DEBUG.NONFINITE has ended, and one that a run has failed in."""
    run, task = tmp_path / "run", Path(__file__).with_name("debug_task.py")
    words = ["TASK.NAME", f"{task}:Small", "TRAIN.BATCH_SIZE", "8", "DEBUG.NONFINITE", "stop"]
    env = {"LAUNCHER_TEST_WRONG": "nan"}
    ended = jobs.train(*words, "OUTPUT_DIR", run, env=env)
    told = re.search(r"launcher replay (\S+) --step (\d+) --rank 0 --stats", ended.err)
    assert told and (told[1], told[2]) == (str(run), "4")
    with jobs.unchanged(run):
        ended = jobs.launch("replay", run, "--step", 4, "--stats", env=env).ok()
    assert "the first that is not finite: gradient" in ended.out
    with jobs.unchanged(run):
        ended = jobs.launch("replay", run, "--step", 5, env={"LAUNCHER_TEST_WRONG": "raise"})
    assert ended.code == 1 and "as planted" in ended.err
