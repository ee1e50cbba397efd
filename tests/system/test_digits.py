"""The main job on real data, and what its run directory holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.system.jobs import (
    DIGITS,
    ROOT,
    assert_once,
    checkpoint_steps,
    environment,
    history,
    measured,
    metrics,
    slow,
    state,
    status,
    strict_json,
    train,
    values,
    without_torch,
)


class Digits:
    """A finished run of configs/digits.yaml."""

    def __init__(self, run: Path, ranks: int | None) -> None:
        self.run, self.ranks = run, ranks or 1
        args = ["--config-file", DIGITS, "OUTPUT_DIR", run]
        self.ended = train(*args, ranks=ranks, cold=True).ok()
        self.logs = [(run / f"logs/rank{rank}.log").read_text() for rank in range(self.ranks)]


@pytest.fixture(scope="module", params=[2, slow(None)], ids=["2 ranks", "one process"])
def digits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits(tmp_path_factory.mktemp("digits") / "run", request.param)


def test_the_accuracy_on_real_data(digits: Digits) -> None:
    """Issue 2, item 2: at least 0.98 on the validation split, at any number of processes."""
    accuracy = values(digits.run, "val/accuracy")
    assert accuracy[max(accuracy)] >= 0.98
    assert len(accuracy) == 20  # EVAL.EVERY 1ep


def test_the_run_directory(digits: Digits) -> None:
    """Contract, section 4: these files, with these names, and nothing else."""
    logs = {f"logs/rank{rank}.log" for rank in range(digits.ranks)}
    files = {str(p.relative_to(digits.run)) for p in digits.run.rglob("*") if p.is_file()}
    events = {name for name in files if name.startswith("tensorboard/events.out.tfevents.")}
    small = {"config.yaml", "environment.json", "status.json", "metrics.jsonl", "history.jsonl"}
    small.add(".lock")  # the claim of one live job
    code = {f"code/step_0/{f}" for f in ("commit.txt", "diff.patch", "manifest.json")}
    small |= {*code, "code/step_0/files/launcher/tasks/digits.py"}
    steps = checkpoint_steps(digits.run)
    kept = {f"checkpoints/step_{n}/{f}" for n in steps for f in ("state.pt", "manifest.json")}
    assert len(events) == 1
    inside = {
        name for name in files if not name.startswith(("checkpoints/last/", "checkpoints/best/"))
    }
    assert inside - events == small | logs | kept


def test_the_small_files(digits: Digits) -> None:
    """Contract, section 4: what status, environment and history say of a completed run."""
    end = status(digits.run)
    assert set(end) == {"state", "step", "epoch", "reason", "host", "pid", "updated"}
    assert (end["state"], end["step"], end["epoch"]) == ("completed", 460, 20)
    around = environment(digits.run)
    assert "--config-file" in around["command"]
    assert around["versions"]["torch"]
    if (ROOT / ".git").exists():
        assert set(around["git"]) >= {"commit", "dirty"}
    assert [rank["device"] for rank in around["ranks"]] == ["cpu"] * digits.ranks
    assert len({rank["pid"] for rank in around["ranks"]}) == digits.ranks
    assert around["cpu"]["usable"] >= 1 and around["cpu"]["reason"]
    events = history(digits.run)
    assert all({"event", "step", "time"} <= set(event) for event in events)
    names = [event["event"] for event in events]
    assert names[0] == "start" and names[-1] == "finish"
    assert set(names[1:-1]) == {"checkpoint"}
    saved = [event["step"] for event in events if event["event"] == "checkpoint"]
    assert set(saved) >= {115, 230, 345, 460}  # CHECKPOINT.EVERY 5ep
    assert sorted(set(saved)) == saved


def test_the_checkpoints(digits: Digits) -> None:
    """Contract, sections 2 and 4: the last two and the best are kept; links are relative."""
    accuracy = values(digits.run, "val/accuracy")
    best = max(accuracy, key=lambda step: (accuracy[step], -step))
    steps = checkpoint_steps(digits.run)
    saved = [e["step"] for e in history(digits.run) if e["event"] == "checkpoint"]
    assert set(steps) == {*saved[-2:], best}
    folder = digits.run / "checkpoints"
    assert os.readlink(folder / "last") == "step_460"
    assert os.readlink(folder / "best") == f"step_{best}"
    for step in steps:
        manifest = strict_json((folder / f"step_{step}/manifest.json").read_text())
        assert {"step", "epoch", "samples", "world_size", "metrics", "files"} <= set(manifest)
        assert (manifest["step"], manifest["world_size"]) == (step, digits.ranks)
        assert manifest["samples"] == step // 23 * 1437 + step % 23 * 64
        assert manifest["metrics"]["val/accuracy"] == accuracy[step]
        size = (folder / f"step_{step}/state.pt").stat().st_size
        assert manifest["files"]["state.pt"]["size"] == size
        assert state(digits.run, step)["progress"]["step"] == step


def test_every_record_is_strict_json_with_its_position(digits: Digits) -> None:
    """Contract, section 5: strict JSON, one flat object a line, each (key, step) once."""
    records = metrics(digits.run)
    for record in records:
        assert {"step", "epoch", "samples", "time"} <= set(record)
        epochs, inside = divmod(record["step"], 23)  # 1437 samples in batches of 64
        assert (record["epoch"], record["samples"]) == (epochs, 1437 * epochs + 64 * inside)
        assert all(type(value) in (int, float) for value in record.values()), record
        assert all("/" in key or key == "digest" for key in measured(record))
    assert_once(digits.run)
    training = "train/loss train/lr train/grad_norm train/accuracy perf/step_s perf/data_s"
    training += " perf/samples_per_s system/rss_gib system/cpu_percent"
    for keys, period in ((training, 10), ("val/loss val/accuracy", 23)):
        for key in keys.split():
            assert list(values(digits.run, key)) == [*range(period, 461, period)]
    times = [record["time"] for record in records]
    assert times == sorted(times)


def test_the_learning_rate_follows_the_config(digits: Digits) -> None:
    """Warm-up over one epoch of 23 steps to 0.05, then half a cosine towards 0."""
    rate = values(digits.run, "train/lr")
    assert rate[10] < rate[20] < 0.05
    assert max(rate.values()) == pytest.approx(0.05, rel=0.02)
    falling = [rate[step] for step in sorted(rate) if step > 30]
    assert falling == sorted(falling, reverse=True)
    assert rate[460] < 1e-4


def test_the_console_and_the_logs(digits: Digits) -> None:
    """Items 4, 5 and 7: rank 0 alone speaks; each rank's log says its place, once. Plain lines
    where there is no terminal: neither carriage returns nor escape sequences."""
    log, output = digits.logs[0], digits.ended.output
    assert log.count("workers a rank: ") + log.count("worker a rank: ") == 1
    assert "val/accuracy" in log and "val/accuracy" in digits.ended.err
    assert output.count(f"The run is in {digits.run}") == 1
    for rank, text in enumerate(digits.logs):
        assert text.count(f"rank {rank} of {digits.ranks} (") == 1
        assert rank == 0 or f"rank {rank} of" not in output
    for text in (output, *digits.logs):
        assert "\r" not in text and "\x1b" not in text


def test_the_runs_config_is_a_config_that_resolves_to_itself(
    digits: Digits, tmp_path: Path
) -> None:
    """Item 3: --check prints the resolved config without torch; config.yaml gives it again."""
    how = {"env": without_torch(tmp_path / "poison"), "cold": True}
    again = train("--config-file", digits.run / "config.yaml", "--check", **how).ok()
    assert again.out == (digits.run / "config.yaml").read_text()
    first = train("--check", "OUTPUT_DIR", digits.run, "--config-file", DIGITS, **how).ok()
    assert first.out == again.out
    assert not (tmp_path / "poison/imported").exists()
