"""Records in trackers: each once, in order, over kills of the training and of the publisher."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.checkpoint.store import _digest
from launcher.errors import RunError, UsageError
from launcher.runs import publish as module
from launcher.runs.publish import Destination, hidden, publish
from launcher.runs.records import Place
from launcher.runs.run import open_run
from launcher.runs.standing import standing_lines
from launcher.runs.trackers import Tracker
from launcher.telemetry.rundir import RunDirectory
from tests.runs.made import append, event, lines, make_run, record
from tests.system import jobs

Sent = dict[tuple[str, int], list[float]]  # key, step -> its values
CONFIG = {"OPTIM.LR": 0.1, "MODEL.WEIGHTS": "", "OPTIM.BETAS": [0.9, 0.999]}


class Killed(BaseException):
    """In place of a SIGKILL: nothing handles it."""


class Story:
    """A run under way, with checkpoints and kills, made by hand."""

    def __init__(self, path: Path) -> None:
        self.path = make_run(path, [], "running", CONFIG, updated=4e9)
        self.step, self.saved = 0, (0, 0)

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.step += 10
            made = [record(self.step, train__loss=random.random(), train__lr=None)]
            made += [record(self.step, val__acc=random.random())] if self.step % 50 == 0 else []
            append(self.path / "metrics.jsonl", lines(made))

    def save(self) -> None:
        self.saved = self.step, (self.path / "metrics.jsonl").stat().st_size
        folder = self.path / "checkpoints" / f"step_{self.step}"
        folder.mkdir(parents=True, exist_ok=True)
        files = {"state.pt": {"size": 0, "sha256": ""}}
        manifest = {"step": self.step, "records": self.saved[1], "files": files}
        manifest["digest"] = _digest(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    def kill(self) -> None:
        """And resume: what no checkpoint covers is done once more."""
        self.step = self.saved[0]
        os.truncate(self.path / "metrics.jsonl", self.saved[1])
        append(self.path / "history.jsonl", lines([event("resume", self.step)]))

    def end(self, state: str) -> None:
        status = json.loads((self.path / "status.json").read_text())
        (self.path / "status.json").write_text(json.dumps(status | {"state": state, "reason": "x"}))

    @property
    def records(self) -> list[dict[str, Any]]:
        return jobs.metrics(self.path) if (self.path / "metrics.jsonl").stat().st_size else []


def once(records: list[dict[str, Any]], *without: str) -> Sent:
    """What a tracker must hold of records."""
    found: Sent = {}
    for one in records:
        for key, value in one.items():
            if key not in ("step", "time", "nonfinite", *without):
                value = math.nan if value is None else value
                found.setdefault((key, one["step"]), [value])
    return found


def same(a: Sent, b: Sent, single: bool = False) -> bool:
    """Whether these are the same values, NaN as well; `single`: as numbers of 32 bits."""

    def plain(sent: Sent) -> dict[tuple[str, int], list[str]]:
        form = jobs.single if single else float
        return {key: [repr(form(v)) for v in values] for key, values in sent.items()}

    return plain(a) == plain(b)


class Events:
    """A folder that TensorBoard reads."""

    single, without = True, ("epoch", "samples")

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.to = Destination("tensorboard-dir", name="tensorboard", folder=folder / "shared")
        self.folder = folder / "shared" / "tensorboard"

    def sent(self) -> Sent:
        found = jobs.event_scalars(self.folder.parent) if self.folder.exists() else {}
        return {key: [value for value, _ in pairs] for key, pairs in found.items()}


class MLflow:
    single, without = False, ()

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.client = pytest.importorskip("mlflow").MlflowClient
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which is for small things
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{folder}/mlruns")
        self.to, self.folder = Destination("mlflow", "project"), folder / "mlruns"

    def run(self) -> Any:
        client = self.client()
        (experiment,) = client.search_experiments(filter_string="name = 'project'")
        (found,) = client.search_runs([experiment.experiment_id])
        return found

    def sent(self) -> Sent:
        if not self.folder.exists():
            return {}
        run, found = self.run(), dict[tuple[str, int], list[float]]()
        for key in run.data.metrics:
            for metric in self.client().get_metric_history(run.info.run_id, key):
                found.setdefault((key, metric.step), []).append(metric.value)
        return found


class Wandb:
    single, without = False, ()

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wandb = pytest.importorskip("wandb")
        wandb.teardown()  # its process keeps the folder that it was started with
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_DIR", str(folder))
        self.to, self.folder = Destination("wandb"), folder

    def items(self, kind: str) -> list[Any]:
        """What `wandb sync` would upload of all sessions."""
        from launcher.runs.trackers.wandb_run import Item, _pieces

        found = []
        for log in sorted(self.folder.glob("wandb/offline-run-*/*.wandb")):
            items = map(Item.FromString, _pieces(log.read_bytes()))
            found += [getattr(item, kind) for item in items if item.HasField(kind)]
        return found

    def rows(self) -> list[dict[str, Any]]:
        def name(item: Any) -> str:
            return "/".join(item.nested_key) or item.key

        items = self.items("history")
        return [{name(i): json.loads(i.value_json) for i in row.item} for row in items]

    def sent(self) -> Sent:
        rows = self.rows()
        assert [row["_step"] for row in rows] == list(range(len(rows)))  # in order, each once
        assert all(row["_timestamp"] == row["time"] for row in rows)
        kept = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
        return once(kept)


KINDS = [Events, MLflow, Wandb]


@pytest.fixture
def tracker(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return request.param(tmp_path, monkeypatch)


def send(story: Story, tracker: Any) -> str:
    return publish(open_run(story.path), tracker.to, False)


def right(story: Story, tracker: Any, count: int | None = None) -> bool:
    """Whether the tracker has these first records of the run, and no others."""
    return same(tracker.sent(), once(story.records[:count], *tracker.without), tracker.single)


def killed_after_sending(publisher: Any) -> None:
    raise Killed


@pytest.mark.parametrize("tracker", KINDS, indirect=True)
def test_only_what_stands_is_sent_and_once(
    tracker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random.seed(1)
    story = Story(tmp_path / "run")
    story.train(3)
    send(story, tracker)
    assert tracker.sent() == {}  # nothing of it stands yet
    story.train(2)
    story.save()
    covered = len(story.records)
    story.train(2)
    with monkeypatch.context() as patch, pytest.raises(Killed):  # the publisher
        patch.setattr(module._Publisher, "_safe", killed_after_sending)
        send(story, tracker)
    assert f"{covered} in all" in send(story, tracker)
    assert right(story, tracker, covered)
    story.kill()
    story.train(4)
    assert send(story, tracker).startswith("0 records")
    story.save()
    story.train(1)
    story.end("stopped")
    with jobs.unchanged(story.path, "published"):
        assert send(story, tracker).endswith("the run: stopped")
        assert send(story, tracker).startswith("0 records")
    assert right(story, tracker)


@pytest.mark.parametrize("seed", range(20))
def test_any_course_of_kills(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(seed)
    monkeypatch.setattr(module, "TOGETHER", random.choice([1, 2, 5, 200]))
    story, events = Story(tmp_path / "run"), Events(tmp_path, monkeypatch)
    acts: list[Callable[[], Any]] = [story.train, story.train, story.save, story.kill]
    for _ in range(60):
        random.choice([*acts, lambda: _published_or_killed(story, events, monkeypatch)])()
        assert events.sent().keys() <= once(story.records, *events.without).keys()
    story.end("completed")
    send(story, events)
    assert right(story, events)


def _published_or_killed(story: Story, events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    if random.random() < 0.5:
        send(story, events)
        return
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(module._Publisher, "_safe", killed_after_sending)
        send(story, events)


def test_what_mlflow_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow, story = MLflow(tmp_path, monkeypatch), Story(tmp_path / "run")
    story.train(2)
    story.save()
    send(story, mlflow)
    run = mlflow.run()
    expected = {key: str(value) for key, value in open_run(story.path).config.items()}
    assert run.data.params == expected and expected["OPTIM.LR"] == "0.1"
    assert run.info.run_name == "run" and run.info.status == "RUNNING"
    config = (story.path / "config.yaml").read_text()
    (story.path / "config.yaml").write_text(config.replace('"LR": 0.1', '"LR": 0.2'))
    story.end("failed")
    send(story, mlflow)
    run = mlflow.run()
    assert run.info.status == "FAILED" and run.data.tags["launcher.reason"] == "x"
    story.kill()
    story.train(1)
    story.end("completed")
    send(story, mlflow)
    run = mlflow.run()
    assert run.info.status == "FINISHED" and run.data.tags["changed.OPTIM.LR"] == "0.2"
    metric = mlflow.client().get_metric_history(run.info.run_id, "train/loss")[-1]
    assert (metric.step, metric.timestamp) == (30, round(1000 * story.records[-1]["time"]))


def test_what_wandb_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, story = Wandb(tmp_path, monkeypatch), Story(tmp_path / "run")
    story.train(2)
    story.end("stopped")
    send(story, wandb)
    configs = {u.key: json.loads(u.value_json) for u in wandb.items("run")[0].config.update}
    for one in wandb.items("config"):
        configs |= {u.key or u.nested_key[0]: json.loads(u.value_json) for u in one.update}
    assert configs["OPTIM.LR"] == 0.1 and configs["OPTIM.BETAS"] == [0.9, 0.999]
    assert [one.exit_code for one in wandb.items("exit")] == [75]
    assert wandb.items("run")[0].display_name == "run"


def test_what_tensorboard_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events, story = Events(tmp_path, monkeypatch), Story(tmp_path / "run")
    story.train(2)
    story.end("completed")
    send(story, events)
    found = EventAccumulator(str(events.folder))
    found.Reload()
    data = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(data).session_start_info.hparams
    assert values["OPTIM.LR"].number_value == 0.1
    data = found.SummaryMetadata("_hparams_/session_end_info").plugin_data.content
    assert HParamsPluginData.FromString(data).session_end_info.status == 1  # success
    (status,) = found.Tensors("status")
    assert status.tensor_proto.string_val == [b"completed (x)"]
    ((_, at),) = jobs.event_scalars(tmp_path / "shared")["train/loss", 20]
    assert at == story.records[-1]["time"]


@pytest.mark.parametrize("tracker", [Events, jobs.slow(MLflow), jobs.slow(Wandb)], indirect=True)
def test_a_full_disk_loses_nothing(tracker: Any, tmp_path: Path) -> None:
    """A limit on the size of files stands for it, in a process of its own."""
    story = Story(tmp_path / "run")
    story.train(900)
    story.end("stopped")
    options = ["--to", tracker.to.to, "--project", tracker.to.project]
    if tracker.to.folder:
        options = ["--to", tracker.to.to, "--dir", str(tracker.to.folder)]
        options += ["--name", tracker.to.name]
    code = "import resource as r, signal as s; s.signal(s.SIGXFSZ, s.SIG_IGN); "
    code += "r.setrlimit(r.RLIMIT_FSIZE, (20_000, 20_000)); import sys; "
    code += "from launcher.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "runs", "publish", str(story.path), *options]
    env = {**os.environ, "PYTHONPATH": str(jobs.ROOT)}
    env.pop("WANDB_SERVICE", None)  # this process's wandb, whose files have no limit
    ended = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ended.returncode == 1, ended.stderr
    assert "nothing is lost: when that is mended, the same command goes on" in ended.stderr
    send(story, tracker)
    assert right(story, tracker)


class Failing(Tracker):
    """One that raises what `error` says."""

    error = ""

    def open(self, *_: Any) -> None:
        raise ConnectionError(self.error)


def failing(monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    monkeypatch.setattr(Failing, "error", error)
    monkeypatch.setattr(module, "make", lambda *_: Failing())


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mlflow", "launcher.runs.trackers.mlflow_run"):
        monkeypatch.setitem(sys.modules, name, None)
    story = Story(tmp_path / "run")
    with jobs.unchanged(story.path), pytest.raises(UsageError, match=r"launcher\[trackers\]"):
        publish(open_run(story.path), Destination("mlflow"), False)


@pytest.mark.parametrize("words", ["tensorboard-dir", "wandb --dir x"])
def test_a_folder_is_for_tensorboard_dir(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    story = Story(tmp_path / "run")
    assert cli.main(["runs", "publish", str(story.path), "--to", *words.split()]) == 2
    assert "--to tensorboard-dir needs --dir DIR" in capsys.readouterr().err


def test_secrets_are_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(tmp_path / "run")
    story.end("stopped")
    monkeypatch.setenv("WANDB_API_KEY", "0123abcd")
    failing(monkeypatch, "http://me:word@host/x refused 0123abcd")
    with pytest.raises(RunError) as caught:
        publish(open_run(story.path), Destination("wandb"), False)
    assert "http://***@host/x refused ***" in str(caught.value)
    assert hidden("postgres://a:b@h and c@d", {}) == "postgres://***@h and c@d"
    kept = "".join(p.read_text() for p in (story.path / "published").iterdir())
    assert "0123abcd" not in kept and "word" not in kept


def test_another_run_and_one_that_went_back_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, story = Events(tmp_path, monkeypatch), Story(tmp_path / "run")
    story.train(4)
    story.save()
    send(story, events)
    before = events.sent()
    os.truncate(story.path / "metrics.jsonl", 100)  # to a checkpoint before a damaged one
    append(story.path / "metrics.jsonl", "x" * 2000)
    with pytest.raises(RunError, match=r"gone back behind what was sent.*another --name"):
        send(story, events)
    history = (story.path / "history.jsonl").read_text()
    (story.path / "history.jsonl").write_text(history.replace('"time": 17', '"time": 18'))
    with pytest.raises(RunError, match="holds another run"):
        send(story, events)
    assert same(events.sent(), before)


def test_a_tracker_that_lost_what_was_sent_gets_all_of_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events, story = Events(tmp_path, monkeypatch), Story(tmp_path / "run")
    for act in (lambda: story.train(4), lambda: story.train(2), lambda: story.end("failed")):
        act()
        story.save()
        if events.folder.exists():
            (file,) = events.folder.iterdir()
            file.unlink()
        send(story, events)
        assert right(story, events)
    assert "all is sent again" in capsys.readouterr().err


def test_a_checkpoint_of_an_earlier_launcher_covers_earlier_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, story = Events(tmp_path, monkeypatch), Story(tmp_path / "run")
    story.train(3)
    story.save()
    file = story.path / "checkpoints/step_30/manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["records"], manifest["digest"]
    file.write_text(json.dumps({**manifest, "digest": _digest(manifest)}))
    send(story, events)
    assert {step for _, step in events.sent()} == {10, 20}


def test_a_resume_that_begins_while_an_ended_run_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(tmp_path / "run")
    story.train(3)
    story.end("stopped")
    directory = RunDirectory(story.path)
    assert len(standing_lines(directory, Place(), 9)) == 3
    told = iter([directory.read_status(), {"state": "running"}])
    monkeypatch.setattr(directory, "read_status", lambda: next(told))
    assert standing_lines(directory, Place(), 9) == []


def test_what_a_float_does_not_hold_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events, story = Events(tmp_path, monkeypatch), Story(tmp_path / "run")
    values = [2**60 + 1, 5, 2**60 + 1]
    made = [record(10 * i, train__loss=1.0, digest=v) for i, v in enumerate(values)]
    append(story.path / "metrics.jsonl", lines(made))
    story.end("stopped")
    send(story, events)
    assert events.sent()["digest", 10] == [5] and ("digest", 0) not in events.sent()
    assert capsys.readouterr().err.count("digest has more digits than") == 1


def test_two_at_once_and_foreign_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, story = Events(tmp_path, monkeypatch), Story(tmp_path / "run")
    story.train(1)
    story.end("stopped")
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    code += "print(1, flush=True); time.sleep(600)"
    send(story, events)
    (lock,) = (story.path / "published").glob("*.lock")
    with subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UsageError, match="another call is sending"):
            send(story, events)
        other.kill()
    foreign = tmp_path / "lightning" / "metrics.csv"
    foreign.parent.mkdir()
    foreign.write_text("epoch,step,loss\n0,1,0.5\n")
    with pytest.raises(UsageError, match="publish sends the launcher's own"):
        publish(open_run(foreign.parent), events.to, False)


def test_following_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, story = Events(tmp_path, monkeypatch), Story(tmp_path / "run")
    acts: list[Callable[[], Any]] = [story.train, story.save, story.train, story.kill]
    acts += [lambda: story.train(3), story.save, lambda: story.end("completed")]
    seen = []

    def sleep(_: float) -> None:
        seen.append(len(events.sent()))
        acts.pop(0)()

    monkeypatch.setattr(module.time, "sleep", sleep)
    publish(open_run(story.path), events.to, True)
    assert not acts and seen == sorted(seen) and seen[2] == 2 and right(story, events)
