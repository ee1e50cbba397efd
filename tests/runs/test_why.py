"""`launcher runs why`: causes planted in real runs and in their files, each named, none invented.

docs/debugging.md has the list with its outcomes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import cli
from launcher.runs.run import open_run, open_runs
from launcher.runs.why import why
from tests.runs.made import event, lines, make_run, record
from tests.system import jobs

TASK = '''"""A task with a helper, labels in a file, and a module that a step imports."""

import json
import os
import pathlib

import planted_helper
import torch

from launcher import CfgNode, Task

HERE = pathlib.Path(__file__).parent


class Labelled(torch.utils.data.Dataset):
    def __init__(self, labels):
        self.x = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(1))
        self.y = torch.tensor(labels)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        if index == 3 and os.environ.get("PLANTED_BAD"):
            raise OSError("unreadable")
        return self.x[index] + 0.01 * torch.randn(4), self.y[index]


class Planted(Task):
    @classmethod
    def defaults(cls):
        return CfgNode({"WIDTH": 8})

    def build_model(self):
        width = self.cfg.TASK.WIDTH
        layers = torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 1)
        return torch.nn.Sequential(*layers)

    def build_dataset(self, split):
        labels = json.loads((HERE / "labels.json").read_text())
        return Labelled(labels if split == "train" else labels[:12])

    def train_step(self, model, batch):
        from planted_late import scaled

        x, y = batch
        loss = (model(x).squeeze(1) - y).square().mean()
        return {"loss": scaled(loss) * planted_helper.FACTOR}

    def eval_step(self, model, batch):
        x, y = batch
        return {"loss": (model(x).squeeze(1) - y).square()}
'''
HELPER, LATE = "FACTOR = 1.0\n", "def scaled(loss):\n    return loss * 1.0\n"
LABELS = [round(((7 * i) % 11) / 11, 3) for i in range(40)]
KEYS = (
    *("TRAIN.BATCH_SIZE", "8", "TRAIN.DURATION", "6step", "EVAL.EVERY", "3step"),
    *("CHECKPOINT.EVERY", "3step", "LOG.EVERY", "1step", "LOG.TENSORBOARD", "False"),
    *("DATALOADER.NUM_WORKERS", "0", "OPTIM.LR", "0.05"),
)


def write(folder: Path) -> Path:
    """The task and what it reads, and a file of weights to begin from."""
    folder.mkdir()
    files = {"planted.py": TASK, "planted_helper.py": HELPER, "planted_late.py": LATE}
    for name, text in {**files, "labels.json": json.dumps(LABELS)}.items():
        (folder / name).write_text(text)
    draw = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (8, 4), "0.bias": (8,), "2.weight": (1, 8), "2.bias": (1,)}
    weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    torch.save(weights, folder / "weights.pt")
    return folder


def train(folder: Path, run: Path, *words: object, ranks: int = 1, **env: str) -> Path:
    fixed = ("TASK.NAME", folder / "planted.py:Planted", "OUTPUT_DIR", run, *KEYS)
    command = ["train", *fixed, *words]
    with jobs.Group(command, ranks, env) if ranks > 1 else jobs.Forked(command, env) as job:
        job.wait().ok()
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in base/run, and the folder of its task beside it."""
    folder = tmp_path_factory.mktemp("base")
    train(write(folder / "task"), folder / "run")
    return folder / "run"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """The same task in another folder, to be changed."""
    return write(tmp_path / "task")


def asked(one: Path, other: Path) -> dict[str, Any]:
    return why(*open_runs([one, other]))


def causes(found: dict[str, Any], *but: str) -> list[str]:
    """What may explain it, in words, but for those that the tests' own set-up brings."""
    named = [one["what"] for one in found["causes"]]
    return [name for name in named if name not in but]


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


# Keys and what `why` calls first, then at which step the records must part (None: they need not).
@pytest.mark.parametrize(
    ("words", "step"),
    [
        (("SEED", "1"), 0),
        (("OPTIM.LR", "0.06"), 1),
        jobs.slow(("OPTIM.SCHEDULE", "cosine"), 2),
        jobs.slow(("OPTIM.MOMENTUM", "0.8"), 3),
        jobs.slow(("TRAIN.BATCH_SIZE", "10"), 1),
        jobs.slow(("TASK.WIDTH", "9"), 0),
        jobs.slow(("TRAIN.GRAD_CLIP", "0.01"), 2),
        jobs.slow(("MODEL.EMA_DECAY", "0.5"), 3),
        jobs.slow(("TRAIN.SAMPLER", "sequential"), 1),
        jobs.slow(("EVAL.SAMPLES", "7"), 3),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_key(words: tuple[str, str], step: int, base: Path, task: Path, tmp_path: Path) -> None:
    found = asked(base, train(base.with_name("task"), tmp_path / "run", *words))
    assert found["records"]["first"] == step
    assert causes(found) == [words[0]]
    assert found["causes"][0]["values"] is not None


def test_a_key_that_cannot_change_bits(base: Path, tmp_path: Path) -> None:
    """It is said, and that no record differs; other windows of means are not compared."""
    words = ("LOG.EVERY", "2step", "CHECKPOINT.KEEP_LAST", "1")
    run = train(base.with_name("task"), tmp_path / "run", *words)
    found = asked(base, run)
    records = found["records"]
    assert (records["first"], records["steps"], records["last"]) == (None, 5, 6)
    assert records["apart"] == 3  # steps 2, 4 and 6
    assert causes(found) == [] and found["next"] == [] == found["remains"]
    assert [one["what"] for one in found["harmless"]] == ["CHECKPOINT.KEEP_LAST", "LOG.EVERY"]
    assert cli.main(["runs", "why", str(base), str(run)]) == 0


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        jobs.slow("planted.py", ".square().mean()", ".abs().mean()"),
        ("planted_helper.py", "1.0", "1.5"),
        ("planted_late.py", "loss * 1.0", "loss * 2.0"),
    ],
)
def test_a_line(file: str, old: str, new: str, base: Path, task: Path, tmp_path: Path) -> None:
    """Of the task, of its helper, and of a module that is imported in a step: the hunk is shown.
    The path of the task's file is another too, which explains nothing."""
    edit(task / file, old, new)
    found = asked(base, train(task, tmp_path / "run"))
    assert found["records"]["first"] == 1
    assert causes(found, "TASK.NAME") == [f"{file} +1 -1"]
    (code,) = [one for one in found["causes"] if one["kind"] == "code"]
    (hunk,) = code["hunks"]
    assert [line[0] for line in hunk if old in line or new in line] == ["-", "+"]


@pytest.mark.slow
def test_a_line_of_a_copy_under_another_name(base: Path, task: Path, tmp_path: Path) -> None:
    edit(task / "planted.py", ".square().mean()", ".abs().mean()")
    (task / "planted.py").rename(task / "copied.py")
    found = asked(base, train(task, tmp_path / "run", "TASK.NAME", task / "copied.py:Planted"))
    assert causes(found) == ["TASK.NAME", "planted.py +1 -1"]


def test_comments_explain_nothing(base: Path, task: Path, tmp_path: Path) -> None:
    edit(task / "planted_helper.py", "FACTOR", "# Of the loss.\nFACTOR")
    found = asked(base, train(task, tmp_path / "run", "SEED", "1"))
    assert causes(found, "TASK.NAME") == ["SEED"]
    assert "planted_helper.py +1 -0" in [one["what"] for one in found["harmless"]]


def test_a_label_is_not_known(
    base: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is invented: all that is known is equal, what remains is said, and the path of the
    task's file is no cause where its content is the same."""
    edit(task / "labels.json", json.dumps(LABELS[:2])[:-1], json.dumps([0.5, *LABELS[1:2]])[:-1])
    run = train(task, tmp_path / "run")
    found = asked(base, run)
    assert found["records"]["first"] is not None
    assert causes(found) == []
    assert [one["what"] for one in found["harmless"]] == ["TASK.NAME"]
    assert "the content of the data" in found["remains"]
    assert cli.main(["runs", "why", str(base), str(run)]) == 1
    out = capsys.readouterr().out
    assert "all that is known of both is equal" in out and "launcher runs why" in out


@pytest.mark.slow
def test_a_longer_data_set(base: Path, task: Path, tmp_path: Path) -> None:
    (task / "labels.json").write_text(json.dumps([*LABELS, 0.5]))
    found = asked(base, train(task, tmp_path / "run"))
    assert causes(found) == ["length of the training data"]
    assert found["causes"][0]["values"] == [40, 41]


def test_one_bit_of_a_weight_file(task: Path, tmp_path: Path) -> None:
    keys = ("MODEL.WEIGHTS", task / "weights.pt")
    one = train(task, tmp_path / "one", *keys)
    weights = torch.load(task / "weights.pt")
    weights["0.bias"].view(torch.int32)[0] ^= 1
    torch.save(weights, task / "weights.pt")
    found = asked(one, train(task, tmp_path / "other", *keys))
    assert found["records"]["first"] is not None
    assert causes(found) == ["the file of MODEL.WEIGHTS"]
    assert "other content" in found["causes"][0]["note"]
    # A copy of it under another name is the same file.
    shutil.copy(task / "weights.pt", task / "copy.pt")
    copy = train(task, tmp_path / "copy", "MODEL.WEIGHTS", task / "copy.pt")
    found = asked(tmp_path / "other", copy)
    assert found["records"]["first"] is None and causes(found) == []


def test_ranks_and_threads(base: Path, tmp_path: Path) -> None:
    """Two ranks have other threads each as well, where the machine has that many."""
    found = asked(base, train(base.with_name("task"), tmp_path / "run", ranks=2))
    assert found["records"]["first"] is not None
    ranks, *others = causes(found)
    assert ranks == "ranks" and set(others) <= {"threads a rank"}


@pytest.mark.slow
def test_a_variable(base: Path, tmp_path: Path) -> None:
    """It is told also where it did not change this small model's bits."""
    run = train(base.with_name("task"), tmp_path / "run", TORCH_MADE_UP="3")
    found = asked(base, run)
    assert causes(found) == ["environment variable TORCH_MADE_UP"]
    assert found["causes"][0]["values"] == ["(not set)", "3"]


def test_a_resume_with_other_code(base: Path, task: Path, tmp_path: Path) -> None:
    """The file differs from the resumed step on, and that is where the records part."""
    run = train(task, tmp_path / "run", "TRAIN.DURATION", "3step")
    edit(task / "planted_helper.py", "1.0", "1.5")
    train(task, run, "--resume", "--allow", "CODE,TRAIN.DURATION")
    found = asked(base, run)
    assert (found["records"]["first"], found["records"]["before"]) == (4, 3)
    (code,) = [one for one in found["causes"] if one["kind"] == "code"]
    assert (code["what"], code["steps"]) == ("planted_helper.py +1 -1", [4, 4])
    weak = {"TRAIN.DURATION", "TASK.NAME"}  # of the first attempt; the file's folder
    assert set(causes(found)) - {code["what"]} <= weak
    # What came after the first difference cannot be why.
    other = train(task, tmp_path / "other")
    late = asked(base, other)
    assert late["records"]["first"] == 1


@pytest.mark.slow
def test_a_checkpoint_that_a_run_began_from(base: Path, tmp_path: Path) -> None:
    place = base / "checkpoints/step_3"
    edited = ("--resume-from", place, "OPTIM.LR", "0.06", "--allow", "OPTIM.LR")
    found = asked(base, train(base.with_name("task"), tmp_path / "run", *edited))
    assert found["records"]["first"] == 4
    assert causes(found) == ["OPTIM.LR", "the checkpoint that it began from"]


@pytest.mark.slow
def test_a_sample_that_could_not_be_read(base: Path, tmp_path: Path) -> None:
    keys = ("DATALOADER.ON_BAD_SAMPLE", "skip")
    one = train(base.with_name("task"), tmp_path / "one", *keys)
    other = train(base.with_name("task"), tmp_path / "other", *keys, PLANTED_BAD="1")
    found = asked(one, other)
    assert causes(found) == ["samples that could not be read, by the logs"]
    assert found["causes"][0]["values"] == [[], ["sample 3: 4 in its place"]]


@pytest.mark.slow
def test_an_unseeded_draw_is_not_known(task: Path, tmp_path: Path) -> None:
    edit(task / "planted_late.py", "loss * 1.0", "loss * (1 + __import__('os').urandom(1)[0])")
    found = asked(train(task, tmp_path / "one"), train(task, tmp_path / "other"))
    assert found["records"]["first"] is not None and causes(found) == []
    assert any("unseeded" in one for one in found["remains"])


def environment(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = run / "environment.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda e: e["versions"].update(torch="2.5.0"), "version of torch"),
        (lambda e: e["versions"].update(python="3.9.1"), "version of python"),
        (lambda e: e["versions"].update(timm="1.0"), "version of timm"),
        (lambda e: e["versions"].update(launcher="0.0.9"), "version of launcher"),
        (lambda e: e["versions"].update(rich="1.0"), "version of rich"),
        (lambda e: e.update(launcher_source="0" * 64), "the launcher's own source (SHA-256)"),
        (lambda e: e.update(cpu_capability="AVX2"), "CPU's vector instructions"),
        (lambda e: e["ranks"][0].update(device_name="EPYC"), "devices"),
        (lambda e: e["ranks"][0].update(device="cuda:0"), "kinds of devices"),
        (lambda e: e["ranks"][0].update(threads=7), "threads a rank"),
        (lambda e: e["variables"].update(NCCL_ALGO="Ring"), "environment variable NCCL_ALGO"),
        (lambda e: e["lengths"].update(val=11), "length of the data of val"),
    ],
)
def test_what_environment_json_tells(
    change: Callable[[dict[str, Any]], object], told: str, base: Path, tmp_path: Path
) -> None:
    """Named, and nothing else with it; that the records are equal all the same is said."""
    run = Path(shutil.copytree(base, tmp_path / "copy", symlinks=True))
    environment(run, change)
    found = asked(base, run)
    assert causes(found) == [told] and found["records"]["first"] is None


def test_a_run_of_an_earlier_version(base: Path, tmp_path: Path) -> None:
    """What it has not recorded is not known, rather than different."""
    run = Path(shutil.copytree(base, tmp_path / "copy", symlinks=True))
    shutil.rmtree(run / "code")
    environment(run, lambda e: [e.pop(key) for key in ("variables", "lengths", "launcher_source")])
    found = asked(base, run)
    assert causes(found) == []
    told = "\n".join(found["unknown"])
    assert all(word in told for word in ("variables", "length", "code"))


# Records alone.


def pair(tmp_path: Path, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Any:
    runs = make_run(tmp_path / "one", ours), make_run(tmp_path / "other", theirs)
    return asked(*runs)["records"]


def test_a_run_that_ended_earlier_is_no_difference(tmp_path: Path) -> None:
    ours = [record(step, train__loss=1 / step) for step in range(1, 9)]
    found = pair(tmp_path, ours, ours[:5])
    assert (found["first"], found["steps"], found["last"]) == (None, 5, 5)


def test_what_may_differ_does_not_count(tmp_path: Path) -> None:
    ours = [record(1, train__loss=1.0, perf__step_s=1.0, system__rss_gib=1.0)]
    theirs = [record(1, train__loss=1.0, perf__step_s=2.0, system__rss_gib=2.0) | {"time": 5.0}]
    assert pair(tmp_path, ours, theirs)["first"] is None


def test_means_over_other_steps_are_not_compared(tmp_path: Path) -> None:
    """But for the rate, which is the last step's, and evaluations."""
    ours = [record(step, train__loss=1.0 / step, train__lr=0.1) for step in (2, 4, 6)]
    theirs = [record(step, train__loss=2.0 / step, train__lr=0.1) for step in (4, 8)]
    found = pair(tmp_path, ours, theirs)
    assert (found["first"], found["apart"], found["steps"]) == (None, 1, 1)
    theirs[0]["train/lr"] = 0.2
    (tmp_path / "other/metrics.jsonl").write_text(lines(theirs))
    found = asked(tmp_path / "one", tmp_path / "other")["records"]
    assert found["values"] == {"train/lr": [0.1, 0.2]}


def test_digests(tmp_path: Path) -> None:
    """To the last bit of a number that no float holds; the first that differs may come after the
    first record that does."""
    big = 2**63 + 12_345
    ours = [record(0) | {"digest": big}, record(2, train__loss=1.0), record(4) | {"digest": big}]
    theirs = [ours[0], record(2, train__loss=2.0), record(4) | {"digest": big + 1}]
    found = pair(tmp_path, ours, theirs)
    assert (found["first"], found["digest_first"]) == (2, (4, [big, big + 1]))
    assert (found["digest_start"], found["digest_equal"]) == (True, 0)


def test_weights_that_differ_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot change these is put behind what can."""
    rows = [
        [record(0) | {"digest": number}, record(1, train__loss=1.0 * number)] for number in (1, 2)
    ]
    sides = [{"SEED": 0, "OPTIM.LR": 0.1, "TRAIN.GRAD_CLIP": 1.0}, {"SEED": 1, "OPTIM.LR": 0.2}]
    for name, records, config in zip(("one", "other"), rows, sides, strict=True):
        make_run(tmp_path / name, records, config=config)
    found = asked(tmp_path / "one", tmp_path / "other")
    named = ["SEED", "OPTIM.LR", "TRAIN.GRAD_CLIP"]
    assert causes(found) == named
    assert cli.main(["runs", "why", "--json", *(str(tmp_path / n) for n in ("one", "other"))]) == 1
    assert json.loads(capsys.readouterr().out)["records"]["values"]["digest"] == [1, 2]


def test_what_came_after_the_first_difference_is_no_cause(tmp_path: Path) -> None:
    ours = [record(step, train__loss=1.0 / step) for step in range(1, 9)]
    theirs = [*ours[:2], *(record(step, train__loss=2.0 / step) for step in range(3, 9))]
    make_run(tmp_path / "one", ours)
    run = make_run(tmp_path / "other", theirs, config={"OPTIM.LR": 0.2, "OPTIM.MOMENTUM": 0.5})
    history = [
        event("start", 0, world_size=1),
        event("resume", 2, world_size=1, differs=["OPTIM.MOMENTUM: 0.9 -> 0.5"]),
        event("resume", 5, world_size=4, differs=["OPTIM.LR: 0.1 -> 0.2"]),
    ]
    (run / "history.jsonl").write_text(lines(history))
    found = asked(tmp_path / "one", run)
    (cause,) = found["causes"]
    assert (cause["what"], cause["values"], cause["steps"]) == (
        "OPTIM.MOMENTUM",
        [0.9, 0.5],
        [3, 3],
    )


def test_another_programs_run(tmp_path: Path, base: Path, capsys: Any) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/metrics.json").write_text('{"iteration": 1, "total_loss": 2.0}\n')
    assert cli.main(["runs", "why", str(base), str(tmp_path / "foreign")]) == 2
    assert re.search("detectron2's", capsys.readouterr().err)
    assert open_run(base).ours
