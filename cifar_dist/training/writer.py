"""Files written by a thread while training continues."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from cifar_dist.errors import RunFailed


class BackgroundWriter:
    """A thread that runs one job at a time, in the order in which they are submitted.

    At its end as a context manager it waits for the last job, so that nothing which the run has
    saved is lost with the process.
    """

    def __init__(self) -> None:
        # A single thread, so that files are on the disk in the order of their jobs: after a kill
        # none is there without those before it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cifar_dist-writer")
        self._running: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job once the one before it is done: a second copy of a run is never kept.

        Raises:
            RunFailed, or anything else: what the one before it raised; this one is not started.
        """
        self.wait()
        self._running = self._thread.submit(job)

    def wait(self) -> None:
        """Wait until all that was submitted is on disk.

        Raises:
            RunFailed, or anything else: what the job raised, once.
        """
        # Forgotten first: its error is raised once, not again when the writer is closed.
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            # The error that ended training is the cause: one of a file would hide it.
            with contextlib.suppress(RunFailed) if error else contextlib.nullcontext():
                self.wait()
        finally:
            self._thread.shutdown()


class Snapshot:
    """A copy of nested dicts, lists and tensors as they are now.

    Made on the tensors' own device, which takes a GPU a fraction of a millisecond and its memory
    once more; what is trained on meanwhile may change.

    Args:
        content: dicts, lists, tuples, tensors and plain values.
    """

    def __init__(self, content: Any) -> None:
        self._content = _mapped(content, lambda tensor: tensor.detach().clone())
        self._taken: torch.cuda.Event | None = None
        if torch.cuda.is_initialized():
            self._device = torch.cuda.current_device()
            self._taken = torch.cuda.Event()
            self._taken.record()

    def on_cpu(self) -> Any:
        """Return the copy with every tensor on the CPU; blocks the calling thread, not training."""
        if self._taken is None:
            return self._content
        # A new thread's device is the first one, where a context would take half a gigabyte.
        with torch.cuda.device(self._device):
            # Not in the stream that trains, which would stand still for as long as the copy takes.
            stream = torch.cuda.Stream()
            stream.wait_event(self._taken)
            with torch.cuda.stream(stream):
                content = _mapped(self._content, _fetched)
                arrived = torch.cuda.Event()
                arrived.record()
            # Not `stream.synchronize`, which torch's debug mode for waits in training steps counts,
            # whatever the thread.
            arrived.synchronize()
        # Released before the file is made: the copy takes device memory that training may need.
        self._content = None
        return content


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        # As plain as they come: an OrderedDict of a subclass may want more than its items.
        kind = type(value) if type(value).__module__ == "collections" else dict
        return kind((key, _mapped(each, function)) for key, each in value.items())
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_mapped(each, function) for each in value)
    return value


def _fetched(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor
    # Pinned, so that copies need not wait one for another; the stream is waited for once.
    pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
