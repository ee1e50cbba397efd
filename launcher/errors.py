"""Errors that are messages for people: shown without a traceback, with an exit code."""


class UsageError(Exception):
    """Something the user can mend before a run starts; the command prints it and exits 2.

    Trying again would only tell it again: neither torchrun nor a job file should.
    """

    exit_code = 2


class RunError(UsageError):
    """The same, where it can only show up while running; exits 1."""

    exit_code = 1


class Ended(Exception):
    """The run has failed, and people have been told why: the command exits with this code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code
