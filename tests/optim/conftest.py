"""The tensors here are small: more threads than one only wait for each other."""

from tests.engine.conftest import one_thread

__all__ = ["one_thread"]
