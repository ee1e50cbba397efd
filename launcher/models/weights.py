"""Starting from weights: a checkpoint, an exported file, or somebody else's state_dict."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher.checkpoint.store import CheckpointStore, DamagedCheckpoint, load_file
from launcher.edges.model import fill_named, load_model_state, model_state, plain_name, some
from launcher.errors import UsageError
from launcher.log import get_logger

logger = get_logger(__name__)
# What wrappers put before the names of weights, and where files keep them.
PREFIXES = ("module.", "model.")
NESTED = ("model", "state_dict", "model_state", "model_state_dict")

Weights = dict[str, Any]  # tensors, and what modules keep with them (get_extra_state)


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint directory, a `.safetensors` file, or a file that torch wrote holds. Raises
    UsageError."""
    if not path.exists():
        raise UsageError(f"there is no file or checkpoint {path}")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file as load_safetensors

            return load_safetensors(path)
        except ImportError as error:
            raise UsageError(f"{path} needs safetensors: pip install 'launcher[export]'") from error
        except Exception as error:  # safetensors' own error type is not public
            raise UsageError(f"{path} is no safetensors file: {error}") from error
    try:
        content: Any = load_file(path)
    except DamagedCheckpoint as error:
        raise UsageError(str(error)) from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no state_dict but a {type(content).__name__}")
    return content


def read_weights(path: Path, ema: bool | None = False) -> tuple[Weights, int | None]:
    """The weights in such a file, and the step they are of, for a checkpoint of this launcher.

    With `ema`, its averaged weights; None: these where there are. Raises UsageError.
    """
    return _weights_of(read(path), path, ema)


def _weights_of(
    content: dict[str, Any], path: Path, ema: bool | None
) -> tuple[Weights, int | None]:
    progress = content.get("progress")
    step = progress.get("step") if isinstance(progress, dict) else None
    ema = isinstance(content.get("ema"), dict) if ema is None else ema
    if ema:
        if not isinstance(content.get("ema"), dict):
            raise UsageError(
                f"{path} holds no averaged weights: MODEL.EMA_DECAY was 0, MODEL.SWA_START empty"
            )
        content = content["ema"]
        content.pop("n_averaged", None)
    content = next((content[key] for key in NESTED if isinstance(content.get(key), dict)), content)
    if others := [
        str(name)
        for name, value in content.items()
        if not isinstance(value, torch.Tensor) and not str(name).endswith("_extra_state")
    ]:
        raise UsageError(
            f"{path} holds no state_dict: names and tensors are needed, which {some(others)} is not"
        )
    if ema:
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return {plain_name(name): value for name, value in content.items()}, step  # to be exported


def match(weights: Weights, model: nn.Module, leave: Collection[str] = ()) -> tuple[Weights, str]:
    """The weights that fit the model, and a report of those that do not ("" where all fit); those
    named in `leave` count for nothing.

    A prefix that all names share (`module.` from DDP) is taken off where that fits better.
    """
    wanted = model_state(model)
    candidates = [{plain_name(name): value for name, value in weights.items()}]
    for prefix in (*PREFIXES, *PREFIXES):  # in either order
        for known in list(candidates):
            if known and all(name.startswith(prefix) for name in known):
                candidates.append({k.removeprefix(prefix): v for k, v in known.items()})
    weights = max(candidates, key=lambda known: len(known.keys() & wanted.keys()))
    weights, wanted = (
        {name: value for name, value in all_.items() if name not in leave}
        for all_ in (weights, wanted)
    )
    mismatched = {
        name: f"{name} {tuple(weights[name].shape)}, the model has {tuple(value.shape)}"
        for name, value in wanted.items()
        if isinstance(value, torch.Tensor)
        and name in weights
        and getattr(weights[name], "shape", None) != value.shape
    }
    # Tied weights stand under one name in files of safetensors.
    here = {_place(value) for name, value in wanted.items() if name in weights} - {None}
    groups = {
        "missing": sorted(
            n for n, v in wanted.items() if n not in weights and _place(v) not in here
        ),
        "unexpected": sorted(weights.keys() - wanted.keys()),
        "of another shape": list(mismatched.values()),
    }
    report = "\n".join(
        f"  {len(names)} {what}: {'; '.join(names[:8])}{'; ...' if len(names) > 8 else ''}"
        for what, names in groups.items()
        if names
    )
    return {k: v for k, v in weights.items() if k in wanted and k not in mismatched}, report


def _place(value: Any) -> tuple[int, torch.Size] | None:
    """Where a tensor's memory is; the same for tied ones."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    return (value.data_ptr(), value.shape) if value.numel() else None


def load_weights(
    path: Path,
    model: nn.Module,
    strict: bool = True,
    ema: bool | None = False,
    leave: Collection[str] = (),
) -> int | None:
    """Load weights into the model, `ema` as for read_weights, but for those named in `leave`; the
    step they are of, if the file tells. Raises UsageError where they do not fit and `strict` says
    that they must."""
    content = read(path)
    weights, step = _weights_of(content, path, ema)
    fitting, report = match(weights, model, leave)
    if report and (strict or not fitting):
        raise UsageError(
            f"the weights of {path} do not fit the model:\n{report}\n"
            "MODEL.WEIGHTS_STRICT False loads what fits."
        )
    if report:
        logger.warning("the weights of %s fit in part:\n%s", path, report)
    load_model_state(model, fitting, strict=False)
    if isinstance(beside := content.get("beside"), dict):  # of a checkpoint of this launcher
        fill_named(model, beside["buffers"])
    logger.info("loaded %d tensors from %s", len(fitting), path)
    return step


def choose_checkpoint(store: CheckpointStore, which: str) -> Path:
    """The path of the newest valid checkpoint ("last"), the valid one with the best metric
    ("best"), or the path given. Raises UsageError where there is none."""
    if which not in ("last", "best"):
        return Path(which)
    manifests = store.manifests()
    steps = [manifest["step"] for manifest in reversed(manifests)]
    if which == "best":
        steps = store.retention.ranked(manifests)
    for step in steps:
        try:
            store.verify(step)
            return store.path(step)
        except DamagedCheckpoint as error:
            logger.warning("checkpoint step_%s is damaged, passed over: %s", step, error)
    told = f" with a {store.retention.metric}" if which == "best" else ""
    raise UsageError(f"there is no valid checkpoint{told} in {store.directory}")
