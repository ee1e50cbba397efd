"""The launcher, all its safeties on, over a task of a few lines."""

import sys
from pathlib import Path
from typing import Any

from common import LOG_EVERY, MOMENTUM, RATE, build_data, build_model, report, spec

from launcher import Task


class Bench(Task):
    def __init__(self, cfg: Any) -> None:
        self.kind = spec().data

    def build_model(self) -> Any:
        return build_model()

    def build_dataset(self, split: str) -> Any:
        return build_data(self.kind)

    def train_step(self, model: Any, batch: Any) -> Any:
        from torch.nn.functional import cross_entropy

        images, labels = batch
        return {"loss": cross_entropy(model(images), labels)}


def _jump(samples: int) -> None:
    """Have the first step count for so many samples: a checkpoint far into an epoch."""
    from launcher.runtime.progress import Progress

    advance = Progress.advance

    def first(self: Any, count: int, *rest: Any) -> None:
        Progress.advance = advance  # type: ignore[method-assign]
        advance(self, samples, *rest)

    Progress.advance = first  # type: ignore[method-assign]


def main() -> None:
    from launcher.cli import main as launcher

    asked = spec()
    settings = {
        "TASK.NAME": "launcher_run:Bench",
        "OUTPUT_DIR": str(Path(asked.out) / "run"),
        "TRAIN.BATCH_SIZE": asked.batch,
        "TRAIN.DURATION": f"{asked.epochs}ep" if asked.epochs else f"{asked.steps}step",
        "TRAIN.DROP_LAST": True,
        "DATALOADER.NUM_WORKERS": asked.workers,
        "DIST.DEVICE": asked.device,
        "OPTIM.LR": RATE,
        "OPTIM.MOMENTUM": MOMENTUM,
        "EVAL.SPLITS": "[]",
        "EVAL.EVERY": "",
        "CHECKPOINT.KEEP_BEST": 0,
        "CHECKPOINT.EVERY": "1ep" if asked.epochs else "",
        "LOG.EVERY": f"{LOG_EVERY}step",
    } | getattr(asked, "settings", {})
    words = [str(word) for pair in settings.items() for word in pair]
    if jump := getattr(asked, "jump", 0):
        _jump(jump)
    code = launcher(["train", *words, *getattr(asked, "options", [])])
    report(asked)
    sys.exit(code)


if __name__ == "__main__":
    sys.modules["launcher_run"] = sys.modules["__main__"]  # one module, with one clock
    main()
