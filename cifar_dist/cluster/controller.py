"""What happens in the process of Ray Train's controller, next to what Ray does there."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.train import WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
)

from cifar_dist.events import Order

WAIT_FOR_NODES_S = 1
SAVE_BEFORE_RESIZE_S = 60
"""How long workers that are to be replaced by more or fewer may take to save a checkpoint."""


class Watch(ControllerCallback):
    """Tells the driver of failures, and has a checkpoint written before workers are replaced.

    Ray stops all workers to change their number; without this, what they did since their last
    checkpoint would be done again.
    """

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if current_state is previous_state:
            if isinstance(current_state, InitializingState | RestartingState | ReschedulingState):
                # Too few nodes for an elastic run: Ray looks again at once, without a pause.
                time.sleep(WAIT_FOR_NODES_S)
            return
        if isinstance(current_state, RestartingState | ReschedulingState):
            error = current_state.training_failed_error
            self._mailbox.put.remote({"kind": "lost", "message": in_one_line(error)})
        elif isinstance(current_state, ResizingState):
            number = ray.get(self._mailbox.request.remote(Order.SAVE))
            # Too late is no failure: the workers go on from the checkpoint before.
            ray.wait([self._mailbox.wait_carried_out.remote(number)], timeout=SAVE_BEFORE_RESIZE_S)


class LeanTorchTrainer(TorchTrainer):
    """A `TorchTrainer` without the processes that a run has no use for.

    Each costs seconds of processor time when workers are to start.
    """

    unused: tuple[type[Any], ...] = (DatasetsCallback,)
    """Callbacks that are left out: each starts a process. This one hands out Ray Datasets."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [each for each in callbacks if not isinstance(each, self.unused)]


class CleanedUpAfter(LeanTorchTrainer):
    """One whose driver gives back itself what a dead controller had reserved.

    Not for a trial: its driver is a process of the cluster's, which may die before the search does.
    """

    unused = (*LeanTorchTrainer.unused, PlacementGroupCleanerCallback)


def what_failed(error: BaseException) -> str:
    """What ended workers that could say nothing, e.g. because they were killed; a line each."""
    if isinstance(error, WorkerGroupError):
        return "\n".join(f"worker {rank}: {e}" for rank, e in error.worker_failures.items())
    return str(error).strip() or type(error).__name__


def in_one_line(error: BaseException) -> str:
    """Which workers failed, and of what: those that died rather than those that noticed it."""
    if not isinstance(error, WorkerGroupError):
        return what_failed(error).splitlines()[0]
    failures = error.worker_failures
    # A worker that dies breaks the others' connections, which then raise.
    died = sorted(r for r, e in failures.items() if isinstance(e, WorkerHealthCheckFailedError))
    named = ", ".join(map(str, died or sorted(failures)))
    return f"{'process of ' if died else ''}worker {named} {'died' if died else 'raised'}"
