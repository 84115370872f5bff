"""The events that a run or a search reports while it runs, and the orders that it takes.

An event is a dict with a ``kind`` and what belongs to it:

``plan``
    ``max_epochs``, ``steps_per_epoch``, ``lines`` (what will run, and where, in words)
``waiting``
    ``message``: what the cluster has to provide, and how long that is waited for; comes before the
    plan
``start``
    ``world_size``, ``checkpoint`` (the one it resumes from, or None); once more at each restart
``lost``
    ``message``: workers ended that should not have; a restart follows, or the run's end
``warning``
    ``message``: what went wrong without ending the run, in one line
``step``
    a few times a second: ``epoch`` (1-based), ``step`` (of the epoch, 1-based), ``loss`` and
    ``accuracy`` (rank 0's), ``images_per_second`` (over all ranks)
``epoch``
    a row of ``metrics.csv``

A search reports ``waiting`` and ``warning``, and only these:

``plan``
    ``trials``, ``finished`` (of them before, in a search that is resumed), ``max_epochs``,
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
"""Reported when a person or the system has asked a run to stop."""


class Order(Enum):
    """The order for a rank that has come to a step's or an epoch's end."""

    CONTINUE = "continue"
    SAVE = "save a checkpoint and continue"
    STOP = "save a checkpoint and stop"


Ask = Callable[[int], Order]
"""Called on every rank with the steps done since the run's start. All ranks must get the same
answer at the same step."""


def ignore(event: Event) -> None:
    """A listener that does nothing."""


def always_continue(step: int) -> Order:
    """Continue, as where nobody interrupts."""
    return Order.CONTINUE
