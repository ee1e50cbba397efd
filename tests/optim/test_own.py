"""An optimiser in a file of one's own, in whole runs: over a kill, in a replay, kept as code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.edges.test_zoo import same
from tests.optim import own
from tests.system import jobs
from tests.system.exact import records

SOURCE = Path(own.__file__).read_text(encoding="utf-8")
CONFIG = """
TASK: {NAME: sine}
TRAIN: {DURATION: 12step, BATCH_SIZE: 64}
OPTIM:
  NAME: signs.py:Signs
  LR: 0.01
  ARGS: [beta=0.8]
  SCHEDULE: linear
  GROUPS: ['*.bias WEIGHT_DECAY=0 LR_SCALE=0.5']
LOG: {EVERY: 1step, DIGEST: 1step, TENSORBOARD: false}
CHECKPOINT: {EVERY: 4step, KEEP_LAST: 9}
"""


@pytest.mark.slow
def test_whole_runs(tmp_path: Path) -> None:
    folder, whole, part = (tmp_path / name for name in ("configs", "whole", "part"))
    folder.mkdir()
    (folder / "c.yaml").write_text(CONFIG)
    (folder / "signs.py").write_text(SOURCE)
    words = ("train", "--config-file", folder / "c.yaml", "OUTPUT_DIR")
    jobs.launch(*words, whole).ok()
    assert (whole / "code/step_0/files/signs.py").read_text() == SOURCE
    assert jobs.values(whole, "train/lr/*.bias")[1] == 0.005

    jobs.launch(*words, part, "TRAIN.DURATION=4step", "OPTIM.HORIZON=12step").ok()
    more = ("--resume", "OPTIM.HORIZON=12step", "--allow", "TRAIN.DURATION")
    refused = jobs.launch(*words, part, *more, "OPTIM.GROUPS=['*.bias LR_SCALE=0.5']")
    assert refused.code == 2 and "--allow OPTIM.GROUPS" in refused.output
    jobs.launch(*words, part, *more).ok()
    for kept in ("model", "optimizer"):
        assert same(jobs.state(part)[kept], jobs.state(whole)[kept]), kept
    ours, theirs = (records(run) for run in (part, whole))
    assert [r for r in ours if "train/lr" in r] == [r for r in theirs if "train/lr" in r]

    # Another version of the file; the run's own replays all the same.
    (folder / "signs.py").write_text(SOURCE.replace("-group", "group"))
    replayed = jobs.launch("replay", whole, "--step", 6, "--code", "run").ok()
    assert "the same" in replayed.out
    assert "NOT the same" in jobs.launch("replay", whole, "--step", 6).output
    allow = ("--allow", "TRAIN.DURATION,OPTIM.HORIZON")
    more = ("--resume", "TRAIN.DURATION=13step", "OPTIM.HORIZON=12step", *allow)
    refused = jobs.launch(*words, whole, *more)
    assert refused.code == 2 and "signs.py +1 -1" in refused.output
    jobs.launch(*words, whole, *more, "--allow", "CODE").ok()
    assert "signs.py" in str(jobs.history(whole, "resume")[-1]["code_changed"])
