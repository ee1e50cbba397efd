"""`launcher runs publish -f` beside a real run, through kills of the training and of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.system import jobs
from tests.system.leash import LEASHED_DIGITS, Leash
from tests.waiting import wait_until

ARGS = ("--config-file", jobs.DIGITS, "TRAIN.DURATION", "2ep", "TASK.NAME", LEASHED_DIGITS)
ARGS += ("CHECKPOINT.EVERY", "10step", "LOG.EVERY", "5step")


@contextlib.contextmanager
def publishing(folder: Path, run: Path) -> Iterator[subprocess.Popen[str]]:
    """In a Python that has no torch."""
    command = [sys.executable, "-m", "launcher", "runs", "publish", str(run), "-f"]
    command += ["--to", "tensorboard-dir", "--dir", str(folder / "shared"), "--name", "tensorboard"]
    poison = folder / "without_torch"
    env = jobs.without_torch(poison) if not poison.exists() else {"PYTHONPATH": str(poison)}
    env = {"PYTHONPATH": f"{env['PYTHONPATH']}:{jobs.ROOT}"}
    env = jobs.clean_environment(env)
    publisher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    try:
        yield publisher
    finally:
        publisher.kill()
        publisher.wait()


def test_each_record_that_stands_is_sent_once(tmp_path: Path) -> None:
    run, shared, leash = tmp_path / "run", tmp_path / "shared", Leash(tmp_path, 27)

    def steps() -> set[int]:
        found = jobs.event_scalars(shared) if (shared / "tensorboard").exists() else {}
        return {step for _, step in found}

    args = (*ARGS, "OUTPUT_DIR", run)
    with jobs.start(*args, env=leash.env) as job:
        jobs.wait_for_step(run, 25, job)
        jobs.wait_for_save(run, 20, job)
        with publishing(tmp_path, run):
            wait_until(lambda: 23 in steps(), 60, "what the checkpoint of the first epoch covers")
        with publishing(tmp_path, run) as publisher:  # the first one was killed
            job.kill()
            # A sign of life of late: it waits only so long for somebody to resume a dead run.
            alive = json.dumps(jobs.status(run) | {"updated": time.time() + 600})
            (run / "status.new").write_text(alive)
            (run / "status.new").replace(run / "status.json")
            assert max(steps()) == 23  # and not the record at step 25
            jobs.train(*args, "--resume").ok()
            assert publisher.wait(60) == 0, publisher.stderr
    assert not (tmp_path / "without_torch" / "imported").exists()
    found = {key: [v for v, _ in values] for key, values in jobs.event_scalars(shared).items()}
    records = jobs.metrics(run)
    own = {key: [v for v, _ in values] for key, values in jobs.event_scalars(run).items()}
    assert {repr(item) for item in found.items()} == {repr(item) for item in own.items()}
    assert max(step for _, step in found) == records[-1]["step"]
