"""From an exception to an exit code and a line on standard error."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import NoReturn, TextIO

from cifar_dist.errors import Interrupted, RunFailed, UserError
from cifar_dist.signals import interrupt_on_signals
from cifar_dist.storage import StoreError

MESSAGE_LENGTH = 500
"""Characters of an exception that fit into a line."""


def run_command(command: Callable[[list[str]], None]) -> NoReturn:
    """Call a command with the words after the program's name, and exit.

    The exit code says what came of it: 0 done; 1 the run failed, or the program did; 2 bad usage,
    configuration or data, one line on standard error; 130 interrupted.
    """
    # Before the command, which loads modules for seconds: a signal then ends it with 130, too.
    interrupt_on_signals()
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:  # `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            # File names and classes may hold what the terminal cannot show.
            stream.reconfigure(errors="backslashreplace")
    try:
        command(sys.argv[1:])
    except (UserError, StoreError) as error:
        # A library's part of the message may have several lines.
        _leave(2, f"error: {' '.join(str(error).split())}", error)
    except RunFailed as error:
        _leave(1, f"error: {error}", error)
    except (Interrupted, KeyboardInterrupt) as error:
        _leave(130, str(error) or "interrupted")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and (_closed(sys.stdout) or _closed(sys.stderr)):
            _leave(0)  # e.g. `| head -1`, which has read all that it wants
        _leave(1, f"error: {_unforeseen(error)}", error)
    _leave(0)


def _unforeseen(error: Exception) -> str:
    """Return an exception that no code expects as a line, and write its traceback to a file."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"[:MESSAGE_LENGTH].rstrip(": ")
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="cifar_dist-", suffix=".txt", delete=False, encoding="utf-8",
            errors="backslashreplace",
        ) as file:  # fmt: skip
            traceback.print_exception(error, file=file)
    except OSError:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{line}; raised at {last.filename}:{last.lineno} (no room for its traceback)"
    return f"{line}; its traceback is in {file.name}"


def _closed(stream: TextIO) -> bool:
    """Return whether nobody reads a stream any more.

    Raises:
        OSError: it cannot be written for another reason.
    """
    try:
        stream.flush()
    except OSError as error:
        # Else Python flushes it once more at its end, and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            return True
        raise
    # Without a buffer there is nothing to flush: what could not be written is lost already.
    watched = select.poll()
    try:
        watched.register(stream, 0)
    except io.UnsupportedOperation:  # no file, e.g. in a notebook
        return False
    return any(event & select.POLLERR for _, event in watched.poll(0))


def _leave(code: int, message: str | None = None, error: Exception | None = None) -> NoReturn:
    try:
        # Flushed first, so that in a file that takes both streams the error comes last.
        _closed(sys.stdout)
    except OSError as failed:
        code = code or 1
        message = message or f"error: the output cannot be written ({failed.strerror})"
    with contextlib.suppress(OSError):
        for line in [message, *getattr(error, "__notes__", [])]:
            if line is not None:
                print(line, file=sys.stderr)
        _closed(sys.stderr)
    sys.exit(code)
