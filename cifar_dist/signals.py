"""SIGINT and SIGTERM: an exit with 130, or a request to save first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cifar_dist.errors import Interrupted
from cifar_dist.events import INTERRUPTED, Listener


def interrupt_on_signals() -> None:
    """Make SIGINT and SIGTERM raise `Interrupted`; the second one ends the process at once."""

    def interrupt(signum: int, frame: object) -> None:
        # Replaced before the exception is raised, so that a second signal also ends a clean-up that
        # hangs. `os._exit` skips clean-ups, which an exception would start anew.
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda signum, frame: os._exit(130))
        raise Interrupted

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)


@contextmanager
def interruption_noted(listener: Listener) -> Iterator[Callable[[], bool]]:
    """Only note the first SIGINT or SIGTERM while this lasts; the second raises `Interrupted`.

    Args:
        listener: notified of the first.

    Yields:
        A function that returns whether there was one.
    """
    noted = False

    def note(signum: int, frame: object) -> None:
        nonlocal noted
        # Raised in the middle of a step, the first one would leave weights and counts that no
        # checkpoint could be made of.
        if noted:
            raise Interrupted
        noted = True
        listener(INTERRUPTED)

    if threading.current_thread() is not threading.main_thread():
        # Python sets handlers in the main thread alone, and `train` may be called in any.
        yield lambda: False
        return
    before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: noted
    finally:
        # In a notebook the kernel's own handlers must come back.
        for each, handler in before.items():
            signal.signal(each, handler)
