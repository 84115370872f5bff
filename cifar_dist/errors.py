"""The errors that end a command, and the exit code of each."""


class UserError(ValueError):
    """Bad usage, configuration or data (exit 2).

    The message is one line: what is wrong, with what value, and what to do.
    """


class RunFailed(RuntimeError):
    """A run that failed after its restarts (exit 1); the message is what the worker raised."""


class Diverged(RunFailed):
    """A loss that is no longer finite: no restart mends it."""


class StorageFailed(RunFailed):
    """A file cannot be written: the machine's fault, which another run or trial would meet too."""


class Interrupted(Exception):
    """The person or the system asked the driver to stop (exit 130)."""


def first_line(error: BaseException) -> str:
    """Return a library's message as a line that fits into one of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
