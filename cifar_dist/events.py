"""What a run or a search tells while it runs.

An event is a dict with a ``kind`` and what belongs to it:

``plan``
    ``max_epochs``, ``steps_per_epoch``, ``lines`` (what will run, and where, in words)
``waiting``
    ``message``: for what the cluster is waited for, and how long; comes before the plan
``start``
    ``world_size``, ``checkpoint`` (the one it goes on from, or None); once more at each restart
``lost``
    ``message``: workers ended that should not have; a restart follows, or the run's end
``warning``
    ``message``: what went wrong without ending the run, in one line
``step``
    a few times a second: ``epoch`` (1-based), ``step`` (of the epoch, 1-based), ``loss`` and
    ``accuracy`` (rank 0's), ``images_per_second`` (over all ranks)
``epoch``
    a row of ``metrics.csv``

A search tells ``waiting`` and ``warning``, and only these:

``plan``
    ``trials``, ``finished`` (of them before, in a search that goes on), ``max_epochs``,
    ``metric``, ``mode`` (``max`` or ``min``), ``lines``
``trial``
    whenever a trial starts, ends an epoch or ends: its row of ``trials.csv``, with ``status``
    also ``running``, ``settings`` (the searched ones) and ``value`` (of the metric, at the best
    epoch so far)
"""

from collections.abc import Callable
from enum import Enum
from typing import Any

Event = dict[str, Any]
Listener = Callable[[Event], None]


INTERRUPTED: Event = {
    "kind": "warning",
    "message": "interrupted: saving a checkpoint; once more to stop without",
}
"""Told when a person or the system has asked a run to stop."""


class Order(Enum):
    """What a rank that has come to a step's or an epoch's end is told to do."""

    GO_ON = "go on"
    SAVE = "save a checkpoint and go on"
    STOP = "save a checkpoint and stop"


Ask = Callable[[int], Order]
"""Asked on every rank with the steps done since the run's start. All ranks must get the same
answer at the same step."""


def ignore(event: Event) -> None:
    """A listener that does nothing."""


def go_on(step: int) -> Order:
    """What is answered where nobody interrupts."""
    return Order.GO_ON
