"""How workers ended, as Ray Train's controller learns and reports it.

No torch here: the workers are started when the controller has loaded what it needs.
"""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback, WorkerGroupError

from cifar_dist.cluster.progress import name_workers
from cifar_dist.events import WorkersLost

OF_A_NEIGHBOUR = ("gloo", "NCCL", "Connection", "Broken pipe")
"""In what a worker raises because another one is gone."""

# A global, since Ray reaches a worker only by calling a function in its process: whatever object
# trained there is out of reach.
_ended_well = False
"""In a worker's process: whether its training function has returned."""


def mark_ended_well() -> None:
    """Note, in a worker, that it takes part in no further collective."""
    global _ended_well
    _ended_well = True


def has_ended_well() -> bool:
    """Return whether this process is a worker that takes part in no further collective."""
    return _ended_well


class ReportFailures(UserCallback):
    """Callback that reports failures to the driver with Ray's public API alone.

    Args:
        coordinator: the run's.
        max_failures: how often the controller restarts workers; the failure after that is the
            run's end, and no loss.
    """

    def __init__(self, coordinator: Any, max_failures: int) -> None:
        self._coordinator = coordinator
        self._failures_left = max_failures

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        # The failure after the last restart ends the run, which the driver reports with its cause:
        # sent as a loss it would be counted as a restart that never came.
        if self._failures_left > 0:
            self._failures_left -= 1
            message = f"{name_workers(worker_exceptions)} failed"
            self._coordinator.put.remote(WorkersLost(message))


def summarize_failure(error: BaseException, died: type[BaseException]) -> str:
    """Return which workers failed, in one line: those that died, not those that noticed it.

    Args:
        error: the failure of all workers.
        died: the kind of error that the controller has where a worker's process died.
    """
    if not isinstance(error, WorkerGroupError):
        return describe_failure(error).splitlines()[0]
    failures = error.worker_failures
    # A worker that dies breaks the others' connections, which then raise.
    dead = [rank for rank, failure in failures.items() if isinstance(failure, died)]
    if dead:
        return f"process of {name_workers(dead)} died"
    # The last line of a traceback is the error itself.
    causes = [str(failures[rank]).strip().rpartition("\n")[2].strip() for rank in sorted(failures)]
    # What a worker raises whose neighbour has gone comes second.
    first = min(causes, key=lambda cause: any(each in cause for each in OF_A_NEIGHBOUR))
    return f"{name_workers(failures)} raised {first}".strip()


def describe_failure(error: BaseException) -> str:
    """Return what ended workers that could report nothing, e.g. when killed; a line each."""
    if isinstance(error, WorkerGroupError):
        return "\n".join(f"worker {rank}: {e}" for rank, e in error.worker_failures.items())
    return str(error).strip() or type(error).__name__
