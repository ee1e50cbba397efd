"""Start real runs as subprocesses, end them whatever happens, and read what they left."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil

from tests.waiting import wait_until

T = TypeVar("T")
R = TypeVar("R", bound="Running")
ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "tools/train.py"
DIGITS = ROOT / "configs/digits.yaml"
TASKS = Path(__file__).with_name("tasks.py")
# What a shell, a scheduler or an outer torchrun may have left, and would change a run.
LEFTOVERS = re.compile(
    r"(OMP|MKL|OPENBLAS)_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|"
    r"(TORCH|SLURM|PYTEST|LAUNCHER|NCCL|GLOO|COV)_?.*|PYTHONPATH|TERM|COLUMNS|LINES|FORCE_COLOR"
)


@dataclass(frozen=True)
class Ended:
    """A run that has ended: its exit code and what it printed."""

    command: list[str]
    code: int
    out: str
    err: str
    seconds: float

    @property
    def output(self) -> str:
        return self.out + self.err

    def ok(self) -> Ended:
        """Itself, after asserting that it ended well."""
        assert self.code == 0, f"{' '.join(self.command)}\nexit code {self.code}\n{self.output}"
        return self


class Running(ABC):
    """A run under way, which the end of a `with` block ends. Its output goes to files: a pipe would
    be held open by orphans."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.began = time.monotonic()
        self.out = tempfile.NamedTemporaryFile("w+b")  # noqa: SIM115
        self.err = tempfile.NamedTemporaryFile("w+b")  # noqa: SIM115

    @property
    @abstractmethod
    def pid(self) -> int: ...

    @abstractmethod
    def poll(self) -> int | None:
        """The exit code of a run that has ended."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL to all its processes; does nothing to a run that has ended."""

    def output(self) -> str:
        return read(self.out) + read(self.err)

    def until(self, condition: Callable[[], T], what: str, timeout: float = 120) -> T:
        """`wait_until` for something that must come before the run ends."""

        def met() -> T:
            over = self.poll() is not None  # asked first: what a run does last counts
            found = condition()
            assert found or not over, f"the run has ended, without {what}"
            return found

        try:
            return wait_until(met, timeout, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{' '.join(self.command)}\n{self.output()}") from None

    def wait(self, timeout: float = 240) -> Ended:
        """Wait for the end. A run that takes longer is killed, and the test fails with its
        output."""
        command = " ".join(self.command)
        try:
            wait_until(lambda: self.poll() is not None, timeout, f"the end of {command}")
        except AssertionError as error:
            self.kill()
            raise AssertionError(f"{error}\n{self.output()}") from None
        code, seconds = self.poll(), time.monotonic() - self.began
        assert code is not None
        return Ended(self.command, code, read(self.out), read(self.err), seconds)

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Job(Running):
    """A command in a process of its own."""

    def __init__(self, command: list[str], env: Mapping[str, str], cwd: Path) -> None:
        super().__init__(command)
        self.process = subprocess.Popen(
            command,
            env=clean_environment(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=self.out,
            stderr=self.err,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.poll()

    def kill(self) -> None:
        if self.poll() is None:
            kill_family(self.process)
            self.process.wait()


def kill_family(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process and all its descendants; torchrun's workers are in sessions of their own.
    Waits for the descendants."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)


def read(file: IO[bytes]) -> str:
    """All of a file, line ends as they were written. It is opened anew: the position in it is the
    run's too, which may be writing."""
    return Path(file.name).read_bytes().decode(errors="replace")


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment without leftovers of the caller's, in which tasks can import from tests/, and
    with `extra`."""
    env = {key: value for key, value in os.environ.items() if not LEFTOVERS.fullmatch(key)}
    return {**env, "PYTHONPATH": str(ROOT), **extra}


def start(
    *args: object,
    ranks: int | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    options: Sequence[str] = (),
) -> Job:
    """Start `tools/train.py` with these arguments: under torchrun with `ranks`, and torchrun's own
    `options`, or alone."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    torchrun += options
    launcher = torchrun if ranks is not None else []
    return Job([sys.executable, *launcher, str(TRAIN), *map(str, args)], env or {}, cwd)


def train(
    *args: object,
    ranks: int | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    timeout: float = 240,
    options: Sequence[str] = (),
) -> Ended:
    """`start`, and wait for the end."""
    return start(*args, ranks=ranks, env=env, cwd=cwd, options=options).wait(timeout)


def without_torch(folder: Path) -> dict[str, str]:
    """An environment in which importing torch fails and leaves `folder`/imported behind."""
    folder.mkdir()
    poison = f"open({str(folder / 'imported')!r}, 'w').close()\nraise ImportError('torch!')\n"
    (folder / "torch.py").write_text(poison)
    return {"PYTHONPATH": str(folder)}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What stands in a folder: inode, size and time of change of everything below it."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        if "__pycache__" not in path.parts:
            stat = path.lstat()
            found[str(path.relative_to(folder))] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


def strict_json(line: str) -> Any:
    """Parse JSON that has no NaN, no Infinity and no key twice."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not strict JSON: {line}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        assert len(keys) == len(set(keys)), f"a key stands twice: {line}"
        return dict(pairs)

    return json.loads(line, parse_constant=refuse, object_pairs_hook=once)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, each of them strict and ended by a line feed."""
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n"), f"{path} ends in a torn line"
    return [strict_json(line) for line in text.splitlines()]


def metrics(run: Path) -> list[dict[str, Any]]:
    return json_lines(run / "metrics.jsonl")


def history(run: Path) -> list[dict[str, Any]]:
    return json_lines(run / "history.jsonl")


def status(run: Path) -> dict[str, Any]:
    return strict_json((run / "status.json").read_text(encoding="utf-8"))


def values(run: Path, key: str) -> dict[int, float]:
    """step -> value of one key of metrics.jsonl."""
    return {record["step"]: record[key] for record in metrics(run) if key in record}


def event_scalars(run: Path) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """(tag, step) -> its (value, wall time)s in the event files, as everybody reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault((tag, event.step), []).append((event.value, event.wall_time))
    return found


def single(value: float | None) -> float:
    """A recorded value as TensorBoard's fast loader shows it: in single precision, NaN for null."""
    return struct.unpack("f", struct.pack("f", math.nan if value is None else value))[0]


def expected_scalars(run: Path) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """What `event_scalars` must be by metrics.jsonl: every key is a tag, each value stands once."""
    return {
        (key, record["step"]): [(single(record[key]), record["time"])]
        for record in metrics(run)
        for key in measured(record)
    }


def state(run: Path, step: int | None = None) -> dict[str, Any]:
    """A checkpoint's state.pt, read without executing anything; by default the last one's."""
    import torch

    name = "last" if step is None else f"step_{step}"
    path = run / "checkpoints" / name / "state.pt"
    return torch.load(path, map_location="cpu", weights_only=True)


def whole_lines(file: Path) -> list[bytes]:
    """Those of a file that is being written: it may be missing, or end in a torn line."""
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []


def last_record(run: Path) -> dict[str, Any]:
    """The last record of a run under way so far; one of step 0 where there is none."""
    lines = whole_lines(run / "metrics.jsonl")
    return strict_json(lines[-1].decode()) if lines else {"step": 0, "time": 0.0}


def wait_for_step(run: Path, step: int, job: Running) -> None:
    """Wait until a record of this step, or a later one, is written."""
    job.until(lambda: last_record(run)["step"] >= step, f"a record of step {step}")


def wait_for_save(run: Path, step: int, job: Running) -> None:
    """Wait until the checkpoint of this step is committed and told of."""

    def saved() -> bool:
        for event in map(json.loads, whole_lines(run / "history.jsonl")):
            if event["event"] == "checkpoint" and event["step"] == step and "failed" not in event:
                return True
        return False

    job.until(saved, f"checkpoint {step}")


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the checkpoints in a run directory, oldest first."""
    names = [path.name for path in (run / "checkpoints").glob("step_*")]
    return sorted(int(name.removeprefix("step_")) for name in names)


def assert_once(run: Path) -> None:
    """Assert that each (key, step) stands once in metrics.jsonl."""
    keys = [(key, record["step"]) for record in metrics(run) for key in measured(record)]
    assert len(keys) == len(set(keys))


def measured(record: dict[str, Any]) -> list[str]:
    """The keys of a record that are neither its position nor about other keys."""
    return [k for k in record if k not in ("step", "epoch", "samples", "time", "nonfinite")]
