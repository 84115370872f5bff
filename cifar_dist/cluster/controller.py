"""What happens in the process of Ray Train's controller, next to what Ray does there."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
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
            if isinstance(current_state, RestartingState | ReschedulingState):
                # Too few nodes for an elastic run: Ray looks again at once, without a pause.
                time.sleep(WAIT_FOR_NODES_S)
            return
        if isinstance(current_state, RestartingState | ReschedulingState):
            error = current_state.training_failed_error
            self._mailbox.put.remote({"kind": "lost", "message": _first_line(error)})
        elif isinstance(current_state, ResizingState):
            number = ray.get(self._mailbox.request.remote(Order.SAVE))
            # Too late is no failure: the workers go on from the checkpoint before.
            ray.wait([self._mailbox.wait_carried_out.remote(number)], timeout=SAVE_BEFORE_RESIZE_S)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
