"""What is trained: the Task interface, the tasks that ship, and how a name becomes a class."""

from launcher.tasks.resolve import BUILTIN, resolve_task
from launcher.tasks.task import Task, make_task, overrides

__all__ = ["BUILTIN", "Task", "make_task", "overrides", "resolve_task"]
