"""Start real runs as subprocesses, end them whatever happens, and read what they left."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import multiprocessing
import os
import re
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil
import pytest

from tests.waiting import wait_until

T = TypeVar("T")
R = TypeVar("R", bound="Running")
ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "tools/train.py"
DIGITS = ROOT / "configs/digits.yaml"
TASKS = Path(__file__).with_name("tasks.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.utils.tensorboard", "torch._dynamo", "launcher.engine.run"])
# What a shell, a scheduler or an outer torchrun may have left, and would change a run.
LEFTOVERS = re.compile(
    r"(OMP|MKL|OPENBLAS)_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|"
    r"(TORCH|SLURM|PYTEST|LAUNCHER|NCCL|GLOO|COV)_?.*|PYTHONPATH|TERM|COLUMNS|LINES|FORCE_COLOR"
)


def slow(*values: Any, id: str | None = None) -> Any:
    """A row of values of `pytest.mark.parametrize` that `make test` leaves out."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


@dataclass(frozen=True)
class Ended:
    """A run that has ended: its exit code and what it printed."""

    command: list[str]
    code: int
    out: str
    err: str

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

    process: Any

    def __init__(self, words: Sequence[object]) -> None:
        self.command = [str(word) for word in words]
        self.out = tempfile.NamedTemporaryFile("w+b")  # noqa: SIM115
        self.err = tempfile.NamedTemporaryFile("w+b")  # noqa: SIM115

    @property
    def pid(self) -> int:
        return self.process.pid

    @abstractmethod
    def poll(self) -> int | None:
        """The exit code of a run that has ended."""

    @abstractmethod
    def join(self) -> None:
        """Wait for the end of a process that was killed."""

    def kill(self) -> None:
        """SIGKILL to all its processes; does nothing to a run that has ended."""
        if self.poll() is None:
            kill_family(self.pid)
            self.join()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def ranks(self) -> list[psutil.Process]:
        """torchrun's children, or the process itself."""
        torchrun = psutil.Process(self.pid)
        found = [p for p in torchrun.children() if "train.py" in " ".join(p.cmdline())]
        return found or [torchrun]

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
        code = self.poll()
        assert code is not None
        return Ended(self.command, code, read(self.out), read(self.err))

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Job(Running):
    """A command in a process of its own."""

    def __init__(
        self, words: Sequence[object], env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> None:
        super().__init__(words)
        self.process = subprocess.Popen(
            self.command,
            env=clean_environment(env or {}),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=self.out,
            stderr=self.err,
            start_new_session=True,
        )

    def poll(self) -> int | None:
        return self.process.poll()

    def join(self) -> None:
        self.process.wait()


class Forked(Running):
    """`launcher WORDS` in a process forked from a server that has torch imported already: it starts
    in a second."""

    def __init__(
        self, words: Sequence[object], env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> None:
        super().__init__(words)
        place = (str(cwd), self.out.name, self.err.name)
        self.process = SERVER.Process(
            target=_forked, args=(self.command, clean_environment(env or {}), *place)
        )
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def join(self) -> None:
        self.process.join(30)


class Group(Running):
    """`launcher WORDS` as so many ranks, each forked as in `Forked`: what torchrun gives its
    workers, without torchrun. The first rank that fails ends the others, as torchrun does."""

    def __init__(
        self,
        words: Sequence[object],
        ranks: int,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> None:
        super().__init__(words)
        world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **world}
        self.processes = [
            SERVER.Process(
                target=_forked,
                args=(
                    self.command,
                    clean_environment(
                        {**(env or {}), **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                    ),
                    *(str(cwd), self.out.name, self.err.name),
                ),
            )
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()
        self.process = self.processes[0]

    def poll(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        if any(codes):
            for process in self.processes:
                process.kill()
            return 1
        return None if None in codes else 0

    def kill(self) -> None:
        for process in self.processes:
            if process.exitcode is None:
                kill_family(process.pid)
        self.join()

    def join(self) -> None:
        for process in self.processes:
            process.join(30)


def settle_in(env: Mapping[str, str], cwd: str, out: str, err: str) -> None:
    """Have this process write to two files, with this environment and folder."""
    for number, name in enumerate((out, err), start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # of the environment that this one has
    os.chdir(cwd)


def _forked(words: list[str], env: Mapping[str, str], cwd: str, out: str, err: str) -> None:
    settle_in(env, cwd, out, err)
    gc.freeze()  # what the server has imported need not be looked through again in each process
    multiprocessing.set_start_method(None, force=True)  # this Python's own, for loader workers
    sys.argv = ["launcher", *words]
    from launcher.cli import main

    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def kill_family(pid: int) -> None:
    """SIGKILL a process and all its descendants; torchrun's workers are in sessions of their own.
    Waits for the descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        others = first.children(recursive=True)
        for process in (first, *others):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(others, timeout=30)


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
    cold: bool = False,
    options: Sequence[str] = (),
) -> Running:
    """Start `launcher train` as one process or as so many ranks. `cold` makes that a Python of its
    own, of which the interpreter's end is part, and ranks workers of a real torchrun, which has its
    own `options` too."""
    if ranks is not None and not (cold or options):
        return Group(["train", *args], ranks, env, cwd)
    if ranks is not None:
        torchrun = [*TORCHRUN, "--standalone", f"--nproc-per-node={ranks}", *options]
        return Job([*torchrun, TRAIN, *args], env, cwd)
    if cold:
        return Job([sys.executable, TRAIN, *args], env, cwd)
    return Forked(["train", *args], env, cwd)


def train(*args: object, timeout: float = 240, **how: Any) -> Ended:
    """`start`, and wait for the end."""
    with start(*args, **how) as job:
        return job.wait(timeout)


def launch(*words: object, env: Mapping[str, str] | None = None) -> Ended:
    """Another command of the launcher, to its end."""
    with Forked(words, env) as job:
        return job.wait()


def without_torch(folder: Path) -> dict[str, str]:
    """An environment in which importing torch fails and leaves `folder`/imported behind."""
    folder.mkdir()
    poison = f"open({str(folder / 'imported')!r}, 'w').close()\nraise ImportError('torch!')\n"
    (folder / "torch.py").write_text(poison)
    return {"PYTHONPATH": str(folder)}


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def slurm_job() -> str:
    """The id of a Slurm job that no other test has now: the port that comes of it is free."""
    while True:
        number = secrets.randbelow(12_000)  # so that its port, 20000 more, is nobody's by chance
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", 20_000 + number))
            return str(number)


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What stands in a folder: inode, size and time of change of everything below it."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        if "__pycache__" not in path.parts:
            stat = path.lstat()
            found[str(path.relative_to(folder))] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


@contextlib.contextmanager
def unchanged(folder: Path, *but: str) -> Iterator[None]:
    """Assert that a block changes nothing in a folder, but for what has these names in it."""

    def found() -> dict[str, tuple[int, int, int]]:
        return {k: v for k, v in snapshot(folder).items() if k.split(os.sep)[0] not in but}

    before = found()
    yield
    assert found() == before


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


def history(run: Path, *events: str) -> list[dict[str, Any]]:
    """The records of history.jsonl, or only those of these events."""
    records = json_lines(run / "history.jsonl")
    return [record for record in records if not events or record["event"] in events]


def status(run: Path) -> dict[str, Any]:
    return strict_json((run / "status.json").read_text(encoding="utf-8"))


def failure(run: Path) -> dict[str, Any]:
    return strict_json((run / "failure.json").read_text(encoding="utf-8"))


def environment(run: Path) -> dict[str, Any]:
    return strict_json((run / "environment.json").read_text(encoding="utf-8"))


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
        return any(
            event["event"] == "checkpoint" and event["step"] == step and "failed" not in event
            for event in map(json.loads, whole_lines(run / "history.jsonl"))
        )

    job.until(saved, f"checkpoint {step}")


def saving(run: Path) -> set[str]:
    """The saves under way: temporary directories of checkpoints."""
    return {path.name for path in (run / "checkpoints").glob(".tmp_*")}


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
