"""Everything that fails late, now: one step, one batch of each evaluation, a save and a load."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import replace

import torch

from launcher.callbacks import Run
from launcher.engine.run import Job, run
from launcher.errors import RunError
from launcher.guard.guard import Guard
from launcher.runs.records import read_objects
from launcher.runtime.process import Runtime
from launcher.telemetry.logs import Logs

NAMES = {
    "start": "build everything",
    "data": "wait for the batch",
    "step": "train for a step, record it",
    "summarize": "summarize",
    "save": "save a checkpoint, end",
    "load": "build everything, load the checkpoint",
}


class Phases:
    """What each phase takes, as the guard is told of them: seconds, and the peak of memory."""

    def __init__(self, guard: Guard, device: torch.device) -> None:
        self.guard, self.device = guard, device
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}  # GiB
        self.name, self.began = "start", time.perf_counter()
        self.split = lambda: ""
        self._enter = guard.enter
        guard.enter = self.enter  # type: ignore[method-assign]

    def enter(self, phase: str) -> None:
        self.close()
        self.name = f"evaluate {self.split()}" if phase == "evaluate" else phase
        self._enter(phase)

    def close(self) -> None:
        """Count the phase at hand."""
        now = time.perf_counter()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self.began
        self.began = now
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.peaks[self.name] = max(self.peaks.get(self.name, 0.0), peak / 2**30)

    def lines(self) -> list[str]:
        """One a phase, in the order in which they came."""
        what = "GiB of GPU memory" if self.device.type == "cuda" else "GiB of memory so far"
        names = {name: NAMES.get(name, name) for name in self.seconds}
        width = max(map(len, names.values()))
        return [
            f"  {told:<{width}}  {self.seconds[name]:8.3f} s  {self.peaks[name]:7.2f} {what}"
            for name, told in names.items()
        ]


class Watcher:
    """A callback that lets the phases know which split is evaluated."""

    def __init__(self, run: Run, phases: Phases) -> None:
        phases.split = lambda: run.recorder.split


def dry_run(job: Job, runtime: Runtime, guard: Guard, logs: Logs) -> bool:
    """Run a job whose config is one step long, then load what it has saved; say what each part
    took. Called by every rank. Raises RunError where a sink failed, which ends no run."""
    phases = Phases(guard, runtime.device)
    job = replace(job, callbacks=[*job.callbacks, (Watcher, {"phases": phases})])
    try:
        done = run(job, runtime, guard, logs)
        if done:
            phases.enter("start")
            phases.name = "load"
            done = run(replace(job, resume=True), runtime, guard, logs)
        if runtime.is_main:
            events, _ = read_objects(job.directory.history)
            failed = [e for e in events if e.get("event") == "sink" and "failed" in e]
            if failed:
                raise RunError("; ".join(f"{e['sink']}: {e['failed']}" for e in failed))
        return done
    finally:
        phases.close()
        if runtime.is_main:
            print("\n".join(["dry run:", *phases.lines()]), flush=True)
