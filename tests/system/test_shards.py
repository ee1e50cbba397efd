"""TRAIN.SHARDS: the same bits on any number of ranks (invariant 9)."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.system import jobs
from tests.system.exact import records
from tests.system.jobs import slow

TASK = Path(__file__).with_name("shards_task.py")
PERIODS = [
    *("LOG.EVERY", "3step", "EVAL.EVERY", "5step", "CHECKPOINT.EVERY", "4step", "LOG.DIGEST"),
    *("2step", "CHECKPOINT.KEEP_LAST", "3", "LOG.TENSORBOARD", "False"),
]
# 53 samples in batches of 19: no number here divides another, an epoch's last batch has 15.
MIXED = [
    *("TASK.NAME", f"{TASK}:Mixed", "TRAIN.BATCH_SIZE", "19", "TRAIN.DURATION", "3ep", *PERIODS),
    *("OPTIM.LR", "0.01", "OPTIM.SCHEDULE", "cosine", "OPTIM.WARMUP", "2step"),
    *("MODEL.EMA_DECAY", "0.9", "TRAIN.GRAD_CLIP", "0.5", "TRAIN.MICRO_BATCH_SIZE", "2"),
]
GAME = [*("TASK.NAME", f"{TASK}:Game", "TRAIN.BATCH_SIZE", "19", "TRAIN.DURATION", "3ep"), *PERIODS]
DIGITS = [*("--config-file", jobs.DIGITS, "TRAIN.DURATION", "20step"), *PERIODS]
TEXT = [
    *("TASK.NAME", "bytes-lm", "TASK.LAYERS", "2", "TASK.WIDTH", "32", "TASK.CONTEXT", "64"),
    *("TASK.DROPOUT", "0.2", "TASK.SHOW_BYTES", "0", "TRAIN.BATCH_SIZE", "22"),
    *("TRAIN.DURATION", "16step", "OPTIM.NAME", "adamw", "OPTIM.LR", "0.003", *PERIODS),
    *("EVAL.SAMPLES", "32", "TRAIN.GRAD_CLIP", "1.0", "MODEL.SWA_START", "4step"),
    *("MODEL.SWA_EVERY", "3step"),
]


def same(ours: object, theirs: object) -> bool:
    if isinstance(theirs, torch.Tensor):
        return isinstance(ours, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        assert isinstance(ours, dict)
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, (list, tuple)):
        assert isinstance(ours, (list, tuple))
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def assert_same(run: Path, reference: Path) -> None:
    """The records, and all of the last checkpoint that is the same on all ranks."""
    assert records(run) == records(reference)
    ours, theirs = jobs.state(run), jobs.state(reference)
    for key in ("model", "optimizer", "ema", "scaler", "progress", "beside"):
        assert same(ours[key], theirs[key]), key


@pytest.mark.parametrize(
    ("words", "shards", "ranks"),
    [
        pytest.param([*MIXED, "DATALOADER.NUM_WORKERS", "1"], 4, (2, 4), id="mixed"),
        pytest.param([*GAME, "TRAIN.GRAD_CLIP", "0.1"], 4, (2,), id="phases"),
        slow([*TEXT, "TRAIN.PRECISION", "bf16"], 6, (3,), id="text in bf16"),
        slow([*MIXED, "TASK.WIDTH", "2000", "DIST.BUCKET_MB", "1"], 8, (2, 4, 8), id="buckets"),
        slow([*MIXED, "TASK.DRAWS", "True"], 8, (2, 8), id="an optimiser that draws"),
        slow([*MIXED, "TASK.WEIGHS", "False"], 12, (2, 3, 4, 6), id="unweighted, uneven"),
        slow([*MIXED, "TRAIN.PRECISION", "fp16"], 4, (2, 4), id="fp16"),
        slow([*MIXED, "MODEL.COMPILE", "True"], 4, (2,), id="compiled"),
        slow([*GAME, "TRAIN.PRECISION", "bf16"], 12, (2, 3, 4, 6, 12), id="phases, uneven"),
        slow(TEXT, 8, (2, 4, 8), id="text"),
        slow([*TEXT, "TRAIN.PRECISION", "bf16"], 12, (3, 6), id="text, uneven"),
        slow([*DIGITS, "MODEL.EMA_DECAY", "0.9"], 8, (2, 4, 8), id="digits"),
        slow([*DIGITS, "DATALOADER.NUM_WORKERS", "2"], 12, (3, 6), id="digits, uneven"),
    ],
)
def test_the_number_of_ranks_changes_nothing(
    words: Sequence[object], shards: int, ranks: Sequence[int], tmp_path: Path
) -> None:
    def run(count: int | None) -> Path:
        out = tmp_path / str(count)
        jobs.train(*words, "TRAIN.SHARDS", shards, "OUTPUT_DIR", out, ranks=count).ok()
        return out

    reference = run(None)
    assert any("digest" in record for record in records(reference))
    for count in ranks:
        assert_same(run(count), reference)


def test_without_shards_it_does(tmp_path: Path) -> None:
    """So the test above can fail."""
    found = []
    for count in (None, 2):
        out = tmp_path / str(count)
        unused = "DIST.FIND_UNUSED_PARAMETERS", "True"
        jobs.train(*MIXED, *unused, "OUTPUT_DIR", out, ranks=count).ok()
        found.append(records(out))
    assert found[0] != found[1]


KILLS = int(os.environ.get("LAUNCHER_TEST_SHARD_KILLS", "30"))


@pytest.mark.parametrize(
    ("words", "kills"),
    [
        pytest.param([*MIXED, "TRAIN.DURATION", "4ep"], 1, id="one kill"),
        slow(
            [*MIXED, "TRAIN.DURATION", "6ep", "DATALOADER.NUM_WORKERS", "1"], KILLS // 3, id="mixed"
        ),
        slow([*GAME, "TRAIN.DURATION", "6ep"], KILLS // 3, id="phases"),
        slow(TEXT, KILLS // 3, id="text"),
    ],
)
def test_resumes_on_other_numbers_of_ranks(
    words: Sequence[object], kills: int, tmp_path: Path
) -> None:
    """Killed at random steps, and each time resumed on another number of ranks."""
    words = [*words, "TRAIN.SHARDS", "12"]
    reference, draw = tmp_path / "reference", random.Random(1)
    jobs.train(*words, "OUTPUT_DIR", reference).ok()
    total = jobs.status(reference)["step"]
    counts: tuple[int | None, ...] = (None, 2, 3, 4, 6)
    made = number = 0
    before: int | None = 2
    while made < kills:
        run, env = tmp_path / f"run{number}", {"LAUNCHER_TEST_SLEEP": "0.02"}
        number += 1
        for at in sorted(draw.sample(range(6, total), min(3, kills - made))):
            ranks = draw.choice([count for count in counts if count != before])
            before = ranks
            with jobs.start(*words, "--resume", "OUTPUT_DIR", run, ranks=ranks, env=env) as job:
                job.until(partial(at_step, run, at), f"step {at}")
                time.sleep(draw.random() * 0.2)
                job.kill()
                made += 1
        last = draw.choice([count for count in counts if count != before])
        jobs.train(*words, "--resume", "OUTPUT_DIR", run, ranks=last).ok()
        assert_same(run, reference)
        assert jobs.history(run, "resume")


def at_step(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").exists() and any(
        record["step"] >= step - 2 for record in jobs.metrics(run)
    )


def test_a_step_of_four_ranks_is_replayed_in_one_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    jobs.train(*MIXED, "TRAIN.SHARDS", "4", "OUTPUT_DIR", run, ranks=4).ok()
    told = jobs.launch("replay", run, "--step", "7", "--rank", "3").ok().out
    assert "on 1 rank, for the 4 that the run had" in told and "digests at steps [6]" in told
    listed = json.loads(jobs.launch("runs", "samples", run, "--step", "7", "--json").ok().out)
    sizes = [[len(samples) for samples in rank["micro_batches"]] for rank in listed["ranks"]]
    assert sizes == [[2, 2, 1]] * 3 + [[2, 2]]  # of 19 samples
    refused = jobs.launch("replay", run, "--step", "7", "--rank", "4")
    assert refused.code == 2 and "ranks 0 to 3" in refused.output


def test_a_state_that_is_the_same_on_all_ranks_goes_to_any_number(tmp_path: Path) -> None:
    words = [*MIXED, "TASK.NAME", f"{TASK}:Steps", "TRAIN.SHARDS", "4"]
    reference, run = tmp_path / "reference", tmp_path / "run"
    jobs.train(*words, "OUTPUT_DIR", reference).ok()
    with jobs.start(*words, "OUTPUT_DIR", run, ranks=2) as job:
        job.until(lambda: (run / "checkpoints/step_4/manifest.json").exists(), "a checkpoint")
        job.kill()
    jobs.train(*words, "--resume", "OUTPUT_DIR", run).ok()
    assert_same(run, reference)


@pytest.mark.parametrize(
    ("words", "ranks", "code", "told"),
    [
        (["TASK.NAME=Normed"], None, 2, "body.1 normalise by the samples"),
        (["TASK.NAME=Sparse"], None, 2, "table.weight have sparse gradients"),
        ([], 3, 2, "not divisible by 3 ranks: start 1, 2, 4 of them"),
        (["TASK.NAME=Spectral"], None, 1, "changes head.parametrizations"),
        (["TASK.NAME=Teacher"], None, 1, "changes teacher.weight, teacher.bias: that would follow"),
        (["TASK.NAME=Late"], 2, 1, "own state differ between rank 1 and rank 0"),
        (
            ["TASK.NAME=Thawing", "MODEL.FREEZE", "['body.1']", "MODEL.THAW", "['body.1@1ep']"],
            *(None, 2, "body.1 normalise by the samples"),
        ),
        (
            ["MODEL.COMPILE", "True", "MODEL.COMPILE_DYNAMIC", "True"],
            None,
            2,
            "COMPILE_DYNAMIC goes by",
        ),
        (["TASK.NAME=Counting"], None, 1, "changes the task's own state"),
        (["TASK.NAME=Gathering"], None, 1, "Task.gather: with TRAIN.SHARDS each shard"),
        (["TASK.NAME=Reducing"], 2, 1, "collective of its own, but with TRAIN.SHARDS each shard"),
        (["TRAIN.MICRO_BATCH_SIZE", "auto"], None, 2, "give TRAIN.MICRO_BATCH_SIZE a number"),
        (["DATALOADER.SEED_SAMPLES", "False"], None, 2, "needs DATALOADER.SEED_SAMPLES True"),
        (["MODEL.SYNC_BN", "True"], None, 2, "does not go with MODEL.SYNC_BN"),
        (["DIST.STATIC_GRAPH", "True"], None, 2, "does not go with DIST.STATIC_GRAPH"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_hold_is_refused(
    words: Sequence[str], ranks: int | None, code: int, told: str, tmp_path: Path
) -> None:
    """Before the first update; mistakes of the config before anything is made."""
    words = [word.replace("TASK.NAME=", f"TASK.NAME={TASK}:") for word in words]
    run = tmp_path / "run"
    ended = jobs.train(*MIXED, "TRAIN.SHARDS", "4", "OUTPUT_DIR", run, *words, ranks=ranks)
    failure = run / "failure.json"
    assert told in (failure.read_text() if failure.exists() else ended.output)
    assert ended.code == (code if ranks is None else 1)
    step = 8 if f"TASK.NAME={TASK}:Late" in words else 0  # its first checkpoint that shows it
    assert not run.exists() if code == 2 else jobs.status(run)["step"] == step


def test_ranks_without_samples_in_an_attempts_first_step(tmp_path: Path) -> None:
    """In fp16, whose scaler makes itself at the first loss; resumed at an epoch's last batch, which
    has fewer samples than there are ranks."""
    words = [*MIXED, "TRAIN.PRECISION", "fp16", "TRAIN.SHARDS", "4", "TASK.SAMPLES", "22"]
    words += ["TRAIN.BATCH_SIZE", "10", "CHECKPOINT.EVERY", "2step", "TRAIN.DURATION", "6step"]
    reference, run = tmp_path / "reference", tmp_path / "run"
    jobs.train(*words, "OUTPUT_DIR", reference).ok()
    jobs.train(*words, "OUTPUT_DIR", run, "TRAIN.DURATION", "2step", ranks=4).ok()
    more = ["--resume", "--allow", "TRAIN.DURATION"]
    jobs.train(*words, "OUTPUT_DIR", run, *more, ranks=4).ok()
    assert same(jobs.state(run)["model"], jobs.state(reference)["model"])


def test_what_an_evaluation_changes_is_undone_on_any_number(tmp_path: Path) -> None:
    words = [*MIXED, "TASK.NAME", f"{TASK}:Remembering", "TRAIN.SHARDS", "4"]
    jobs.train(*words, "OUTPUT_DIR", tmp_path / "1").ok()
    jobs.train(*words, "OUTPUT_DIR", tmp_path / "2", ranks=2).ok()
    assert_same(tmp_path / "2", tmp_path / "1")


def test_what_is_drawn_before_the_first_step_is_the_same(tmp_path: Path) -> None:
    """A split of the data, a constant projection, weights that on_start moves."""
    words = [*MIXED, "TASK.NAME", f"{TASK}:Begun", "TRAIN.SHARDS", "4", "TRAIN.DURATION", "6step"]
    jobs.train(*words, "OUTPUT_DIR", tmp_path / "1").ok()
    jobs.train(*words, "OUTPUT_DIR", tmp_path / "2", ranks=2).ok()
    assert_same(tmp_path / "2", tmp_path / "1")


def test_frozen_batch_norm_is_taken(tmp_path: Path) -> None:
    words = [*MIXED, "TASK.NAME", f"{TASK}:Frozen", "TRAIN.SHARDS", "4", "TRAIN.DURATION", "5step"]
    jobs.train(*words, "OUTPUT_DIR", tmp_path / "1").ok()
    jobs.train(*words, "OUTPUT_DIR", tmp_path / "2", ranks=2).ok()
    assert_same(tmp_path / "2", tmp_path / "1")


@pytest.mark.slow
def test_other_threads_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    words = [*MIXED, "TRAIN.SHARDS", "4", "OUTPUT_DIR", tmp_path / "run"]
    two = {"OMP_NUM_THREADS": "2"}
    jobs.train(*words, "TRAIN.DURATION", "4step", env=two, cold=True).ok()
    more = [*words, "--resume", "--allow", "TRAIN.DURATION"]
    refused = jobs.train(*more, env={"OMP_NUM_THREADS": "1"}, cold=True)
    assert refused.code == 2 and "Set OMP_NUM_THREADS=2" in refused.output
    jobs.train(*more).ok()  # those of the checkpoint
