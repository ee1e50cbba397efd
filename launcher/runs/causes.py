"""What may explain that two runs differ, each kind by a function of its own.

Only what the runs have written down is compared.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from launcher.config.changes import BEGINNING, DATA, FREE
from launcher.provenance.kept import Version, changes, contents, versions
from launcher.runs.attempts import Attempt
from launcher.runs.pair import Cause, Found, Pair
from launcher.runs.run import Run

# Free to change at a resume, and yet part of what a run is from its start.
NOT_FREE = (
    *BEGINNING,
    *("DIST.DEVICE", "DIST.BACKEND", "DIST.FIND_UNUSED_PARAMETERS", "EVAL."),
)
NEVER = {DATA, "OUTPUT_DIR"}  # told elsewhere; different in any two runs
RATE = (
    *("TRAIN.DURATION", "OPTIM.LR", "OPTIM.ADAMW_LR", "OPTIM.LR_SCALING"),
    *("OPTIM.LR_BATCH", "OPTIM.GROUPS", "OPTIM.LAYER_DECAY", "OPTIM.SCHEDULE", "OPTIM.WARMUP"),
    *("OPTIM.HORIZON", "OPTIM.FINAL_FACTOR", "OPTIM.FLOOR", "OPTIM.MILESTONES", "OPTIM.PERIOD"),
    *("OPTIM.PERIOD_GROWTH", "OPTIM.GAMMA", "OPTIM.POWER", "OPTIM.PEAK", "OPTIM.START_FACTOR"),
    *("OPTIM.DECAY", "OPTIM.DECAY_SHAPE"),
)
BATCHES = ("TRAIN.BATCH_SIZE", "TRAIN.DROP_LAST", DATA, "TRAIN.DURATION")
START = ("SEED", "TASK.", "MODEL.")  # what weights begin from
LATER = ("OPTIM.", "TRAIN.")  # what the launcher uses from the first step on
AT_START = "the weights at step 0"
# Packages that nothing is computed with.
BESIDE = ("yacs", "tensorboard", "psutil", "rich")


def config(pair: Pair) -> None:
    """Keys that differ, each by what it can change."""

    def differing(ours: Attempt, theirs: Attempt) -> dict[str, list[Any]]:
        sides = ours.settings, theirs.settings
        return {
            key: [side.get(key) for side in sides]
            for key in sorted({*sides[0], *sides[1]} - NEVER - ours.unknown - theirs.unknown)
            if sides[0].get(key) != sides[1].get(key)
        }

    found = pair.found
    for key, values, steps in pair.over_parts(differing):
        kind, note = _effect(pair, key)
        cause = Cause(kind, key, values, note, steps)
        (found.causes if kind else found.harmless).append(cause)
    for found_attempts, run in zip(pair.attempts, pair.runs, strict=True):
        lost = {k for one in found_attempts if one.begin < pair.last for k in one.unknown} - {DATA}
        if lost:
            found.unknown.append(f"{run.name}: {', '.join(sorted(lost))} before its last resume")


def _effect(pair: Pair, key: str) -> tuple[str, str]:
    """The kind of cause that a key's difference is, "" for none, and what to say of it."""
    settings = [one.settings for found in pair.attempts for one in found]
    if key.startswith("EVAL."):
        if pair.evaluations_alone:
            return "hinted", "it changes what is evaluated"
        return "weak", "it changes evaluations, and training only where a hook acts on these"
    if key == "DATALOADER.NUM_WORKERS" and any(
        one.get("DATALOADER.SEED_SAMPLES") is False for one in settings
    ):
        return "key", "with DATALOADER.SEED_SAMPLES False, random draws are each worker's own"
    if key.startswith(FREE) and not key.startswith(NOT_FREE):
        return "", ""
    start = pair.differing.digest_start
    if key.startswith(BEGINNING) and start:
        return "", "the weights at step 0 are equal"
    hinted = (
        ("train/lr", RATE),
        ("samples", BATCHES),
        ("epoch", BATCHES),
    )
    if any(name.startswith(shown) and key in keys for name in pair.keys for shown, keys in hinted):
        return "hinted", ""
    if start is False and key.startswith(START):
        return "hinted", "the weights differ at step 0 already"
    if start is False and key.startswith(LATER):
        return "weak", "the weights differ at step 0 already, before it is used"
    constant = all(one.get("OPTIM.SCHEDULE") == "constant" for one in settings)
    if key == "TRAIN.DURATION" and constant:
        return "weak", "with OPTIM.SCHEDULE constant it matters where the task's own code uses it"
    if key == "DATALOADER.ON_BAD_SAMPLE":
        return "weak", "it matters where a sample cannot be read"
    return "key", ""


def code(pair: Pair) -> None:
    """Files of the task that differ, with their hunks, and the commit of their repository."""
    kept = [{version.name: version for version in versions(run.path)} for run in pair.runs]
    missing = set[str]()

    def of(side: int, attempt: Attempt) -> Version | None:
        version = kept[side].get(attempt.code)
        if version is None:
            missing.add(pair.runs[side].name)
        return version

    def differing(ours: Attempt, theirs: Attempt) -> dict[str, Any]:
        sides = of(0, ours), of(1, theirs)
        if sides[0] is None or sides[1] is None:
            return {}
        files, main = contents(sides[1]), sides[0].main
        # A copy of the task's file under another name is compared with it all the same.
        renamed = sides[1].main not in sides[0].digests and main not in files
        if main and sides[1].main and renamed:
            files[main] = files.pop(sides[1].main)
        told: dict[str, Any] = {c.name: c for c in changes(contents(sides[0]), files)}
        for name in [name for name, change in told.items() if change.what != "changed"]:
            if not all(side.imports(name) for side in sides if side is not None):
                told[f"*{name}"] = told.pop(name)
        for key in ("commit", "diff"):
            values = [side.manifest.get(key) for side in sides if side is not None]
            if values[0] != values[1]:
                told[f"*{key}"] = values
        return told

    found = pair.found
    for name, change, steps in pair.over_parts(differing):
        if name == "*commit":
            cause = Cause("repository", "commit of the task's repository", change, "", steps)
            found.causes.append(cause)
        elif name == "*diff":
            note = "compare the diff.patch of both; it is of more files than the task's own"
            what = "uncommitted changes of the task's repository"
            found.causes.append(Cause("repository", what, None, note, steps))
        elif _alike(change.before, change.after):
            note = "comments and layout alone"
            found.harmless.append(Cause("", str(change), None, note, steps))
        else:
            kind, note, hunks = "code", "", list(change.hunks())
            if change.what != "changed":
                note, hunks = f"only {pair.runs[change.what == 'new'].name} has it", []
            if name.startswith("*"):
                kind, note = "weak", f"{note}: loaded, but no import statement leads to it"
            found.causes.append(Cause(kind, str(change), None, note, steps, hunks))
    if not missing and not any(cause.kind == "code" for cause in found.causes):
        _same_task(found)
    for run in sorted(missing):
        found.unknown.append(f"{run}: the code of the task: no version of it is kept in code/")


def _same_task(found: Found) -> None:
    """Where no file of the task differs, TASK.NAME may still: by the path of its file."""
    for cause in [cause for cause in found.causes if cause.what == "TASK.NAME"]:
        names = {str(value).split("/")[-1] for value in cause.values or ()}
        if len(names) == 1:
            found.causes.remove(cause)
            found.harmless.append(Cause("", cause.what, cause.values, "files of the same content"))


def _alike(before: bytes | None, after: bytes | None) -> bool:
    """Whether two sources are the same program, but for comments and layout."""
    if before is None or after is None:
        return False
    try:
        return ast.dump(ast.parse(before)) == ast.dump(ast.parse(after))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def lineage(pair: Pair) -> None:
    """What runs began from, and what a resume began afresh."""
    starts = [found[0].record.get("from") if found else None for found in pair.attempts]
    if starts[0] != starts[1]:
        pair.found.causes.append(Cause("lineage", "the checkpoint that it began from", starts))
    afresh: list[list[str]] = []
    for found in pair.attempts:
        told = [
            f"step {one.begin}: {text}"
            for one in found
            if one.begin < pair.last
            for text in one.record.get("differs") or ()
            if not re.match(r"[\w.]+: .* -> ", str(text), re.DOTALL)
        ]
        afresh.append(told)
    if afresh[0] != afresh[1]:
        what = "what did not come from the checkpoint at a resume"
        pair.found.causes.append(Cause("lineage", what, afresh))


def lengths(pair: Pair) -> None:
    def training(ours: Attempt, theirs: Attempt) -> dict[str, list[Any]]:
        values = [ours.settings.get(DATA), theirs.settings.get(DATA)]
        known = DATA not in ours.unknown | theirs.unknown
        return {DATA: values} if known and values[0] != values[1] else {}

    for _, values, steps in pair.over_parts(training):
        what = "length of the training data"
        pair.found.causes.append(Cause("length", what, values, "", steps))
    for run, attempts_ in zip(pair.runs, pair.attempts, strict=True):
        if any(DATA in one.unknown for one in attempts_):
            pair.found.unknown.append(f"{run.name}: the length of the training data")
    ours, theirs = (
        value if isinstance(value, dict) else {} for value in pair.environment("lengths")
    )
    for split in sorted((ours.keys() & theirs.keys()) - {"train"}):
        if ours[split] != theirs[split]:
            kind = "hinted" if pair.evaluations_alone else "weak"
            note = "" if pair.evaluations_alone else "it changes evaluations"
            values = [ours[split], theirs[split]]
            pair.found.causes.append(Cause(kind, f"length of the data of {split}", values, note))


def weights(pair: Pair) -> None:
    """The file of MODEL.WEIGHTS, as it was at the start."""
    found, start = pair.found, pair.differing.digest_start
    if start is False:
        found.causes.append(Cause("weights", AT_START, None, "their digests differ"))
    told = [one[0].record.get("weights") if one else None for one in pair.attempts]
    named = [one[0].settings.get("MODEL.WEIGHTS") if one else "" for one in pair.attempts]
    if not all(named):
        return
    for run, one in zip(pair.runs, told, strict=True):
        if not isinstance(one, dict):
            found.unknown.append(f"{run.name}: which file MODEL.WEIGHTS was")
    files = [one for one in told if isinstance(one, dict)]
    if len(files) < 2:
        return
    sums = [one.get("sha256") for one in files]
    if None not in sums and sums[0] == sums[1]:
        # Whatever its path is.
        moved = [cause for cause in found.causes if cause.what == "MODEL.WEIGHTS"]
        found.causes = [cause for cause in found.causes if cause not in moved]
        found.harmless += [
            Cause("", cause.what, cause.values, "files of the same content") for cause in moved
        ]
        return
    if start:
        return
    if None not in sums:
        note = "files of other content (SHA-256)"
        found.causes.append(Cause("weights", "the file of MODEL.WEIGHTS", named, note))
    elif files[0].get("bytes") != files[1].get("bytes"):
        sizes = [one.get("bytes") for one in files]
        found.causes.append(Cause("weights", "the size of the file of MODEL.WEIGHTS", sizes))
    elif files[0].get("changed") != files[1].get("changed") and named[0] == named[1]:
        note = "it was written anew between the two; whether it is the same is not known"
        found.causes.append(Cause("weights", "the file of MODEL.WEIGHTS", named, note))


def ranks(pair: Pair) -> None:
    def differing(ours: Attempt, theirs: Attempt) -> dict[str, list[Any]]:
        values = [ours.world_size, theirs.world_size]
        if all(one.settings.get("TRAIN.SHARDS") for one in (ours, theirs)):
            return {}  # any number gives the same bits
        return {"ranks": values} if None not in values and values[0] != values[1] else {}

    for what, values, steps in pair.over_parts(differing):
        note = "sums are rounded otherwise, and each rank draws random numbers of its own"
        pair.found.causes.append(Cause("ranks", what, values, note, steps))


def environment(pair: Pair) -> None:
    """Versions, threads, devices and variables: of each run's last attempt."""
    found = pair.found
    # environment.json is written anew by each attempt.
    since = {
        run.name: attempts_[-1].begin
        for run, attempts_ in zip(pair.runs, pair.attempts, strict=True)
        if len(attempts_) > 1
    }
    whose = "; ".join(f"of {name}'s last attempt, from step {at} on" for name, at in since.items())

    def compare(kind: str, what: str, values: list[Any], note: str = "") -> None:
        if None not in values and values[0] != values[1]:
            told = "; ".join(text for text in (note, whose) if text)
            found.causes.append(Cause(kind, what, values, told))

    known = [value for value in pair.environment("versions") if isinstance(value, dict)]
    if len(known) == 2:
        for name in sorted({*known[0], *known[1]}):
            values = [one.get(name, "(none)") for one in known]
            kind = "launcher" if name == "launcher" else "version"
            note = ""
            if name in BESIDE:
                kind, note = "beside", "nothing is computed with it, unless the task does"
            compare(kind, f"version of {name}", values, note)
    sources = pair.environment("launcher_source")
    if pair.environment("versions", "launcher")[0] == pair.environment("versions", "launcher")[1]:
        shown = [str(one)[:12] if one else None for one in sources]
        note = "of one version, so at least one is a changed checkout"
        compare("launcher", "the launcher's own source (SHA-256)", shown, note)
    for key, kind, what in (
        ("threads", "threads", "threads a rank"),
        ("device_name", "device", "devices"),
    ):
        sides = [of_ranks(run, key) for run in pair.runs]
        compare(kind, what, sides)
    compare("device", "kinds of devices", [of_ranks(run, "device", True) for run in pair.runs])
    compare("device", "CPU's vector instructions", pair.environment("cpu_capability"))
    if any(
        one.settings.get("DATALOADER.SEED_SAMPLES") is False for a in pair.attempts for one in a
    ):
        note = "with DATALOADER.SEED_SAMPLES False, random draws are each worker's own"
        compare("key", "loader workers", pair.environment("cpu", "loader", "workers"), note)
    variables = [value for value in pair.environment("variables") if isinstance(value, dict)]
    if len(variables) == 2:
        for name in sorted({*variables[0], *variables[1]}):
            values = [one.get(name, "(not set)") for one in variables]
            compare("variable", f"environment variable {name}", values)
    for run in pair.runs:
        if missing := [k for k in ("versions", "ranks", "variables") if k not in run.environment]:
            found.unknown.append(f"{run.name}: {', '.join(missing)}: not in its environment.json")
        if run.name in since:
            found.unknown.append(
                f"{run.name}: versions, threads, devices and variables up to step "
                f"{since[run.name]}: its environment.json is that of the last attempt"
            )


def of_ranks(run: Run, key: str, kind: bool = False) -> Any:
    """A value of all ranks: the one that all have, or the list."""
    ranks = run.environment.get("ranks")
    if not isinstance(ranks, list) or not all(isinstance(one, dict) for one in ranks):
        return None
    values = [str(one.get(key)).partition(":")[0] if kind else one.get(key) for one in ranks]
    return values[0] if len({repr(value) for value in values}) == 1 else values


def bad_samples(pair: Pair) -> None:
    """Samples that could not be read, and what stood in their place, by the ranks' logs."""
    skips = [
        any(one.settings.get("DATALOADER.ON_BAD_SAMPLE") == "skip" for one in found)
        for found in pair.attempts
    ]
    if not any(skips):
        return
    taken: list[list[str]] = []
    for run in pair.runs:
        told = set()
        for log in run.directory.logs.glob("rank*.log*"):
            try:
                text = log.read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            told |= set(
                re.findall(r"(samples? \d+) of data set .*; took sample (\d+) in its place", text)
            )
        taken.append([f"{bad}: {other} in its place" for bad, other in sorted(told)])
    if taken[0] != taken[1]:
        what = "samples that could not be read, by the logs"
        pair.found.causes.append(Cause("lineage", what, [one[:5] for one in taken]))


ALL = (config, code, lineage, lengths, weights, ranks, environment, bad_samples)
