"""`launcher tune-loader` on small slow data sets."""

import json
from pathlib import Path

import psutil
import pytest

from launcher.cli import tune_loader
from launcher.cli.tune_loader import Measured, Setting, choose, keys_of, main, variants
from launcher.config import load_config
from launcher.errors import RunError, UsageError
from launcher.runtime import cpu

TASK = """
import time
import torch
from torch.utils.data import Dataset, IterableDataset
from launcher import CfgNode, Task

class Slow(Dataset):
    def __init__(self, ms):
        self.ms = ms
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        time.sleep(self.ms / 1e3)  # fails if negative
        return torch.zeros(10)

class Stream(IterableDataset):
    def __len__(self):
        return 10
    def __iter__(self):
        raise AssertionError("nothing is measured")

class Mine(Task):
    @classmethod
    def defaults(cls):
        return CfgNode({"MS": 4.0, "STREAM": False})
    def build_model(self):
        raise AssertionError("no model is needed")
    def build_dataset(self, split):
        return Stream() if self.cfg.TASK.STREAM else Slow(self.cfg.TASK.MS)
    def train_step(self, model, batch): ...
    def eval_step(self, model, batch): ...
"""


@pytest.fixture(autouse=True)
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task's config, and two CPUs."""
    name = f"tuned_{tmp_path.name}"  # a module name of its own in this process
    Path(f"{name}.py").write_text(TASK)
    Path("slow.yaml").write_text(
        f"TASK.NAME: {name}.py:Mine\nTRAIN.BATCH_SIZE: 8\nDIST.DEVICE: cpu\n"
    )
    monkeypatch.setattr(cpu, "cpu_budget", lambda ranks: cpu.CpuBudget(2, 2, 2, "a test"))


def run(*words: str) -> int:
    return main(["--config-file", "slow.yaml", *words])


def test_it_measures_and_writes_what_a_config_can_build_on(capsys: pytest.CaptureFixture) -> None:
    children = set(psutil.Process().children())
    assert run("--seconds", "4", "--json", "-o", "fast.yaml") == 0
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar where there is no terminal
    report = json.loads(out)
    tried = [(m["workers"], m["prefetch"]) for m in report["settings"]]
    assert set(tried) <= {(0, 2), (1, 2), (1, 4), (2, 2), (2, 4)} and (0, 2) in tried
    for m in report["settings"]:
        assert m["samples_per_s"] > 0 and m["start_s"] > 0
        assert (m["workers_mib"] > 0) == (m["workers"] > 0)
    assert sum(m["best"] for m in report["settings"]) == 1
    best = report["best"]
    assert report["overrides"]["DATALOADER.NUM_WORKERS"] == best["workers"]
    assert set(psutil.Process().children()) <= children  # the workers are gone

    Path("mine.yaml").write_text("_BASE_: [slow.yaml, fast.yaml]\n")
    cfg = load_config("mine.yaml", require_task=False).cfg
    assert best["workers"] == cfg.DATALOADER.NUM_WORKERS
    assert not best["workers"] or best["prefetch"] == cfg.DATALOADER.PREFETCH_FACTOR
    assert [p.name for p in Path.cwd().iterdir() if p.name.startswith(".")] == []


def test_the_table_and_the_overrides(capsys: pytest.CaptureFixture) -> None:
    assert run("--seconds", "3", "TASK.MS=2", "DATALOADER.PREFETCH_FACTOR", "3") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:4] == ["workers", "prefetch", "pin", "samples/s"]
    assert out.count("<- best") == 1 and "DATALOADER.NUM_WORKERS " in out
    assert "2 of 2 usable CPUs a rank (a test)" in out


def test_too_little_time_is_said() -> None:
    with pytest.raises(UsageError, match=r"0\.05 s were not enough .* give more --seconds"):
        run("--seconds", "0.05", "TASK.MS", "20")


def test_a_failing_sample_ends_it() -> None:
    with pytest.raises(
        RunError, match=r"sample \d+ of data set Slow failed: .*must be non-negative"
    ):
        run("--seconds", "1", "TASK.MS", "-1")


def test_tensors_need_no_workers(capsys: pytest.CaptureFixture) -> None:
    assert main(["TASK.NAME", "sine", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["overrides"] == {"DATALOADER.NUM_WORKERS": 0} and report["settings"] == []


def test_iterable_data_sets_are_not_measured(capsys: pytest.CaptureFixture) -> None:
    assert run("TASK.STREAM", "True") == 0
    assert "Stream is an iterable data set. Nothing is measured" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"Nothing to write to fast\.yaml"):
        run("TASK.STREAM", "True", "-o", "fast.yaml")


def test_a_file_of_the_users_is_not_replaced() -> None:
    tensors = ["TASK.NAME", "sine", "-o"]
    Path("mine.yaml").write_text("SEED: 1\n")
    with pytest.raises(UsageError, match="was not written by tune-loader"):
        main([*tensors, "mine.yaml"])
    assert Path("mine.yaml").read_text() == "SEED: 1\n"
    with pytest.raises(UsageError, match="lies in none that exists"):
        main([*tensors, "none/mine.yaml"])
    assert main([*tensors, "mine.yaml", "--force"]) == 0
    assert main([*tensors, "mine.yaml"]) == 0  # its own file
    assert load_config("mine.yaml", require_task=False).cfg.DATALOADER.NUM_WORKERS == 0


def measured(workers: int, prefetch: int, speed: float, pin: bool = False) -> Measured:
    return Measured(workers, prefetch, pin, speed, 0.1, 0.0)


def test_the_best_is_the_fewest_workers_within_five_percent() -> None:
    rows = [measured(0, 2, 50), measured(2, 4, 96), measured(2, 2, 90), measured(8, 2, 100)]
    assert choose(rows) is rows[1]
    assert keys_of(rows[1], cuda=False) == {
        "DATALOADER.NUM_WORKERS": 2,
        "DATALOADER.PREFETCH_FACTOR": 4,
    }
    assert keys_of(measured(0, 2, 1, True), cuda=True) == {
        "DATALOADER.NUM_WORKERS": 0,
        "DATALOADER.PIN_MEMORY": "true",
    }


def test_the_settings() -> None:
    assert [tune_loader.worker_counts(n) for n in (1, 2, 6, 8)] == [
        [0, 1], [0, 1, 2], [0, 1, 2, 4, 6], [0, 1, 2, 4, 8],
    ]  # fmt: skip
    assert variants(Setting(0, 2, False), cuda=False) == []
    assert variants(Setting(1, 2, False), cuda=False) == [Setting(1, 4, False)]
    assert len(variants(Setting(1, 2, False), cuda=True)) == 3


class Fake(tune_loader.Tuner):
    """A tuner whose measurements are given: speed, None without time, by workers and prefetch."""

    def __init__(self, speeds: dict[tuple[int, int], float | None]) -> None:
        super().__init__(None, None, lambda: None, float("inf"))  # type: ignore[arg-type]
        self.speeds, self.tried = speeds, list[Setting]()

    def _measure(self, setting: Setting, seconds: float) -> Measured | None:
        self.tried.append(setting)
        speed = self.speeds.get((setting.workers, setting.prefetch), 100.0)
        return measured(setting.workers, setting.prefetch, speed) if speed else None


def test_more_workers_are_given_up_after_two_that_do_not_help() -> None:
    tuner = Fake({(0, 2): 20, (1, 2): 20.5, (2, 2): 40, (4, 2): 41})
    tuner.speeds |= {(8, 2): 39, (4, 4): 60, (2, 4): 40, (8, 4): 40, (1, 4): 20}
    rows = tuner.run(32, False, lambda *_: None)
    assert [s.workers for s in tuner.tried] == [0, 1, 2, 4, 8, 4, 2, 8, 1]
    assert choose(rows) == measured(4, 4, 60)
    assert any("16 workers" in n and "twice in a row" in n for n in tuner.notes)


def test_what_the_time_was_too_short_for_is_said() -> None:
    tuner = Fake({(0, 2): 20, (1, 2): 40, (2, 2): None})
    rows = tuner.run(2, False, lambda *_: None)
    assert [m.workers for m in rows] == [0, 1]
    assert tuner.notes == [
        "Not measured, as the time is over: 2 workers, prefetch 2; 1 worker, prefetch 4; "
        "2 workers, prefetch 4."
    ]


def test_settings_that_might_not_fit_are_not_tried() -> None:
    tuner = Fake({(n, 2): float(n + 1) for n in (0, 1, 2, 4)})
    tuner.worker_bytes = psutil.virtual_memory().total // 4
    rows = tuner.run(8, False, lambda *_: None)
    assert max(m.workers for m in rows) <= 2
    assert any("8 workers" in note and "might not fit" in note for note in tuner.notes)
