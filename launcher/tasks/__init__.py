"""What is trained: the Task interface, the tasks that ship, and how a name becomes a class."""

from launcher.tasks.resolve import BUILTIN, has_eval_step, resolve_task
from launcher.tasks.task import Task, make_task

__all__ = ["BUILTIN", "Task", "has_eval_step", "make_task", "resolve_task"]
