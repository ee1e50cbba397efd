"""A yacs-configured PyTorch DDP training launcher. Importing it imports no torch."""

from yacs.config import CfgNode

from launcher.tasks.task import Task

__version__ = "0.1.0"
__all__ = ["CfgNode", "Task", "__version__"]
