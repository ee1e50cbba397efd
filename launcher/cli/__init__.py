"""The `launcher` command: one file a subcommand, imported when it is called."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from itertools import dropwhile

from launcher.errors import Ended, UsageError

COMMANDS = {
    "new": "a small project to begin with: task, config, test, README, job file",
    "train": "train a task from a config, alone or under torchrun or srun",
    "checkpoint": "list, verify and export the checkpoints of a run",
    "sweep": "a config for each point of a grid, or drawn at random; the jobs that run them all",
    "runs": "read runs back: how they are doing, what they recorded",
    "replay": "a step of a run once more, with the proof that it is the same",
    "config": "list what ships, a config's keys, and where their values come from; compare two",
    "find-lr": "a range test of the learning rate on a config, and what it suggests",
    "tune-loader": "measure loader workers, prefetch and pinning on a config's data",
    "doctor": "what this machine, and a config on it, will let a run do; is it repeatable",
}
# How long another rank lets rank 0 speak and leave first: torchrun ends the rest at the first exit.
GRACE_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code; mistakes of the user are shown as messages."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # What torch.distributed.launch puts first; the same stands in the environment.
    argv = [*dropwhile(lambda word: re.match("--local[-_]rank=", word), argv)]
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        from launcher import __version__

        print(f"launcher {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        print(f"launcher: there is no command {name!r}{hint}; see launcher --help", file=sys.stderr)
        return 2
    return call(_command(name), rest)


def _command(name: str) -> Callable[[list[str]], int]:
    if name == "new":
        from launcher.cli.new import main as new

        return new
    if name == "train":
        from launcher.cli.train import train

        return train
    if name == "checkpoint":
        from launcher.cli.checkpoint import main as checkpoint

        return checkpoint
    if name == "runs":
        from launcher.cli.runs import main as runs

        return runs
    if name == "sweep":
        from launcher.cli.sweep import main as sweep

        return sweep
    if name == "replay":
        from launcher.cli.replay import main as replay

        return replay
    if name == "find-lr":
        from launcher.cli.find_lr import main as find_lr

        return find_lr
    if name == "tune-loader":
        from launcher.cli.tune_loader import main as tune_loader

        return tune_loader
    if name == "doctor":
        from launcher.cli.doctor import main as doctor

        return doctor
    from launcher.cli.config import main as config

    return config


def call(command: Callable[[list[str]], int], argv: list[str]) -> int:
    """Call a command; print a UsageError as a message, once for all ranks."""
    try:
        return command(argv)
    except UsageError as error:
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
        if rank != "0":
            time.sleep(GRACE_S)
        prefix = "launcher" if rank == "0" else f"launcher: rank {rank}"
        print(f"{prefix}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Ended as ended:
        return ended.exit_code
    except BrokenPipeError:  # `launcher config keys | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: launcher COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "launcher COMMAND --help tells more.",
        ]
    )
