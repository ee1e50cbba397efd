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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

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


class Job:
    """A run under way. Its output goes to files: a pipe would be held open by orphans."""

    def __init__(self, command: list[str], env: Mapping[str, str], cwd: Path) -> None:
        self.command = command
        self.began = time.monotonic()
        self.out = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        self.err = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            env=clean_environment(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=self.out,
            stderr=self.err,
            start_new_session=True,
        )

    def wait(self, timeout: float) -> Ended:
        """Wait for the end. A run that takes longer is killed, and the test fails with its
        output."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"{' '.join(self.command)}\nwas still running after {timeout} s:\n"
                f"{read(self.out)}{read(self.err)}"
            ) from None
        seconds = time.monotonic() - self.began
        return Ended(self.command, code, read(self.out), read(self.err), seconds)

    def kill(self) -> None:
        kill_family(self.process)
        self.process.wait()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


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
    """All of a file, line ends as they were written."""
    file.seek(0)
    return file.read().decode(errors="replace")


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment without leftovers of the caller's, and with `extra`."""
    env = {key: value for key, value in os.environ.items() if not LEFTOVERS.fullmatch(key)}
    return {**env, **extra}


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
    timeout: float = 150,
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


def state(run: Path, step: int | None = None) -> dict[str, Any]:
    """A checkpoint's state.pt, read without executing anything; by default the last one's."""
    import torch

    name = "last" if step is None else f"step_{step}"
    path = run / "checkpoints" / name / "state.pt"
    return torch.load(path, map_location="cpu", weights_only=True)


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the checkpoints in a run directory, oldest first."""
    names = [path.name for path in (run / "checkpoints").glob("step_*")]
    return sorted(int(name.removeprefix("step_")) for name in names)
