"""A call in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class InThread:
    """A call in a thread of its own, where Ray leaves signals to the main thread."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        # A daemon: an interrupted command must be able to exit while the call still waits for Ray.
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.result = call()
        except BaseException as error:
            # `SystemExit` too, by which a trial ends a stopped run: uncaught it would be lost, and
            # the call would look like one that returned None.
            self.error = error

    @property
    def alive(self) -> bool:
        """Whether the call has not ended yet."""
        return self._thread.is_alive()

    def join(self, timeout: float) -> None:
        """Wait for the call's end, so many seconds at most."""
        self._thread.join(timeout)
