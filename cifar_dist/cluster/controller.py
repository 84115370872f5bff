"""What happens in the process of Ray Train's controller, next to what Ray does there.

No torch here: the workers are started when the controller has loaded what it needs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution import controller
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
)
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from cifar_dist.events import Order

WAIT_FOR_NODES_S = 1
SAVE_BEFORE_RESIZE_S = 60
"""How long workers that are to be replaced by more or fewer may take to save a checkpoint."""


class Watch(ControllerCallback):
    """Tells the driver of failures, and has a checkpoint written before workers are replaced.

    Ray stops all workers to change their number; without this, what they did since their last
    checkpoint would be done again.
    """

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if current_state is previous_state:
            if isinstance(current_state, InitializingState | RestartingState | ReschedulingState):
                # Too few nodes for an elastic run: Ray looks again at once, without a pause.
                time.sleep(WAIT_FOR_NODES_S)
            return
        if isinstance(current_state, RestartingState | ReschedulingState):
            error = current_state.training_failed_error
            self._coordinator.put.remote({"kind": "lost", "message": in_one_line(error)})
        elif isinstance(current_state, ResizingState):
            number = ray.get(self._coordinator.request.remote(Order.SAVE))
            # Too late is no failure: the workers go on from the checkpoint before.
            ray.wait(
                [self._coordinator.wait_completed.remote(number)], timeout=SAVE_BEFORE_RESIZE_S
            )


class TrainController(controller.TrainController):
    """Ray Train's, told the driver's environment variables when it is made.

    Args:
        environment: to be set in its process.
        what: what Ray's takes.
    """

    def __init__(self, environment: Mapping[str, str], **what: Any) -> None:
        os.environ.update(environment)
        super().__init__(**what)


class FixedNumber(FixedScalingPolicy):
    """Always the same number of workers, for whom a placement group alone asks.

    Ray's own asks a coordinator beside it, a process that shares out nodes between elastic runs and
    Ray Datasets, and waits for it to start. Placement groups make a cluster scale up by themselves.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


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
