"""Whole runs of a task that sets logging up itself."""

from __future__ import annotations

import re
from pathlib import Path

from tests.system import jobs

TASK = Path(__file__).with_name("logging_task.py")


def test_each_line_stands_once_whatever_the_task_sets_up(tmp_path: Path) -> None:
    """basicConfig at its import, dictConfig that disables all loggers in its __init__, and
    logging.disable while it trains; with two ranks and a loader worker each."""
    run, theirs = tmp_path / "run", tmp_path / "theirs"
    theirs.mkdir()
    keys = ["TRAIN.BATCH_SIZE", "8", "TRAIN.DURATION", "2ep", "OPTIM.LR", "1e-5"]
    keys += ["LOG.EVERY", "1step", "DATALOADER.NUM_WORKERS", "1", "LOG.TENSORBOARD", "False"]
    env = {"LAUNCHER_TEST_LOGS": str(theirs)}
    job = ["TASK.NAME", f"{TASK}:Speaks", *keys, "OUTPUT_DIR", run]
    ended = jobs.train(*job, ranks=2, env=env, cold=True).ok()
    console = ended.output.splitlines()
    logs = [(run / f"logs/rank{rank}.log").read_text().splitlines() for rank in range(2)]

    def count(text: str, lines: list[str]) -> int:
        return len([line for line in lines if re.search(text, line)])

    for step in range(1, 11):
        line = rf" step {step}  epoch \d  loss "
        assert [count(line, lines) for lines in (console, *logs)] == [1, 1, 0], step
        assert count(rf"^theirs INFO step {step}  epoch \d  loss ", console) == 0
    assert count("I done: 10 steps", console) == 1
    for text in ("before my own set-up", "after my own set-up"):
        assert [count(text, lines) for lines in (console, *logs)] == [1, 1, 1]
        assert count(f"^theirs INFO {text}$", console) == 1
    # Info of workers is rank 0's alone on the console; errors are everybody's.
    said = [count("INFO author.data: sample .* is read", lines) for lines in logs]
    assert count("^theirs INFO sample .* is read", console) == count("is read", console) == said[0]
    errors = sum(count("ERROR author.data: sample .* is odd", lines) for lines in logs)
    assert count("^theirs ERROR sample .* is odd", console) == count("is odd", console) == errors
    assert min(said) > 0 and errors > 0
    for rank in range(2):
        text = (theirs / f"rank{rank}.log").read_text()
        assert text.count("after my own set-up") == 1
        assert text.count("theirs INFO step 1  epoch 0") == (rank == 0)
        assert text.count("is odd") == count("is odd", logs[rank])
