"""What is trained: the Task interface, the tasks that ship, and how a name becomes a class."""

from launcher.tasks.resolve import BUILTIN, resolve_task
from launcher.tasks.task import Task

__all__ = ["BUILTIN", "Task", "resolve_task"]
