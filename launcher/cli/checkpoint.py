"""`launcher checkpoint list|verify|export`: what a run's checkpoints are worth."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from launcher.checkpoint.store import CheckpointStore, DamagedCheckpoint, Retention
from launcher.config import CfgNode
from launcher.errors import UsageError
from launcher.telemetry.rundir import RunDirectory


def main(argv: list[str]) -> int:
    """Run the command; `verify` exits 1 where a checkpoint is damaged."""
    p = argparse.ArgumentParser(prog="launcher checkpoint", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True, metavar="list|verify|export")
    listing = commands.add_parser("list", help="the checkpoints of a run")
    listing.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    listing.add_argument("--json", action="store_true", help="print JSON instead of a table")
    verify = commands.add_parser("verify", help="compare files with their manifests")
    verify.add_argument("path", type=Path, metavar="RUN|CKPT")
    verify.add_argument("--json", action="store_true", help="print JSON instead of lines")
    export = commands.add_parser("export", help="write the weights alone")
    export.add_argument("path", type=Path, metavar="CKPT", help="a checkpoint directory or file")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.safetensors|.pt")
    export.add_argument("--ema", action="store_true", help="the averaged weights")
    options = p.parse_args(argv)
    if options.command == "list":
        return _list(options.run, options.json)
    if options.command == "verify":
        return _verify(options.path, options.json)
    return _export(options.path, options.output, options.ema)


def rows(run: Path) -> list[dict[str, Any]]:
    """One row a checkpoint of a run, oldest first: step, epoch, metric, bytes, age in seconds,
    whether it is valid or why not, and whether it is the last or the best."""
    directory = RunDirectory(run)
    if not directory.checkpoints.is_dir():
        raise UsageError(f"{run} holds no checkpoints: it has no directory checkpoints/")
    store = CheckpointStore(directory.checkpoints, _retention(directory))
    found: list[dict[str, Any]] = []
    for step in store.steps():
        path = store.path(step)
        row: dict[str, Any] = {"step": step, "epoch": None, "metric": None, "problem": None}
        row["bytes"] = sum(file.stat().st_size for file in path.iterdir())
        row["age_s"] = time.time() - path.stat().st_mtime
        try:
            manifest = store.verify(step)
            row["epoch"] = manifest["epoch"]
            row["metric"] = manifest["metrics"].get(store.retention.metric)
        except DamagedCheckpoint as error:
            row["problem"] = str(error)
        found.append(row)
    valid = [row["step"] for row in found if row["problem"] is None]
    best = store.retention.ranked([m for m in store.manifests() if m["step"] in valid])
    for row in found:
        row["last"] = row["step"] == max(valid, default=None)
        row["best"] = row["step"] == (best[0] if best else None)
    return found


def _retention(directory: RunDirectory) -> Retention:
    """Which metric the run called best; none where its config cannot be read."""
    import yaml

    try:
        saved = CfgNode(yaml.safe_load(directory.config.read_text(encoding="utf-8")))
        return Retention.from_config(saved)
    except (OSError, yaml.YAMLError, AttributeError, TypeError):
        return Retention()


def _list(run: Path, as_json: bool) -> int:
    found = rows(run)
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    metric = _retention(RunDirectory(run)).metric or "metric"
    table = [("step", "epoch", metric, "size", "age", "", "state")]
    for row in found:
        value = row["metric"]
        marks = " ".join(name for name in ("last", "best") if row[name])
        table.append(
            (
                str(row["step"]),
                "" if row["epoch"] is None else str(row["epoch"]),
                f"{value:.6g}" if isinstance(value, (int, float)) else "",
                _size(row["bytes"]),
                _age(row["age_s"]),
                marks,
                "valid" if row["problem"] is None else f"damaged: {row['problem']}",
            )
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
    return 0


def _verify(path: Path, as_json: bool) -> int:
    if (path / "checkpoints").is_dir():
        store = CheckpointStore(path / "checkpoints")
        steps = store.steps()
    elif path.name.startswith("step_") and path.is_dir():
        store, steps = CheckpointStore(path.parent), [int(path.name.removeprefix("step_"))]
    else:
        raise UsageError(f"{path} is neither a run directory nor a checkpoint step_<N>")
    problems: dict[str, str | None] = {}
    for step in steps:
        try:
            store.load(step)
            problems[store.path(step).name] = None
        except DamagedCheckpoint as error:
            problems[store.path(step).name] = str(error)
    if as_json:
        print(json.dumps(problems, indent=2))
    else:
        for name, problem in problems.items():
            print(f"{name}: {'valid' if problem is None else 'damaged: ' + problem}")
    return 1 if any(problems.values()) else 0


def _export(path: Path, output: Path, ema: bool) -> int:
    import torch

    from launcher.edges.batch import is_dense
    from launcher.edges.model import some
    from launcher.models.weights import read_weights

    weights, step = read_weights(path, ema)
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        if output.suffix == ".safetensors":
            try:
                from safetensors.torch import save_file
            except ImportError as error:
                raise UsageError("pip install 'launcher[export]' for .safetensors") from error
            # Weights that share memory stand once each in this format, which holds dense ones only.
            tensors = {k: v.clone().contiguous() for k, v in weights.items() if is_dense(v)}
            if left := [name for name in weights if name not in tensors]:
                raise UsageError(f"-o {output}: .pt can hold {some(left)}, .safetensors cannot.")
            save_file(tensors, temporary, {"step": str(step), "format": "pt"})
        elif output.suffix == ".pt":
            torch.save(weights, temporary)
        else:
            raise UsageError(f"-o {output}: the name must end in .safetensors or .pt")
        temporary.replace(output)
    except OSError as error:
        raise UsageError(f"-o {output}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{len(weights)} tensors of step {step} in {output}", file=sys.stderr)
    return 0


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _age(seconds: float) -> str:
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
