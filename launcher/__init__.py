"""A yacs-configured PyTorch DDP training launcher. Importing it imports no torch."""

from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from launcher.tasks.task import Task

if TYPE_CHECKING:
    from launcher.api.runs import open_run
    from launcher.api.train import train

__version__ = "0.1.0"
__all__ = ["CfgNode", "Task", "__version__", "open_run", "train"]


def __getattr__(name: str) -> Any:
    """The parts that not everybody needs, imported when they are asked for."""
    if name == "train":
        from launcher.api.train import train

        return train
    if name == "open_run":
        from launcher.api.runs import open_run

        return open_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
