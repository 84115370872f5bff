"""What a run or a search tells while it runs.

An event is a dict with a ``kind`` and what belongs to it:

``plan``
    ``max_epochs``, ``steps_per_epoch``, ``lines`` (what will run, and where, in words)
``start``
    ``world_size``, ``checkpoint`` (the one it goes on from, or None); once more at each restart
``step``
    a few times a second: ``epoch`` (1-based), ``step`` (of the epoch, 1-based), ``loss`` and
    ``accuracy`` (rank 0's), ``images_per_second`` (over all ranks)
``epoch``
    a row of ``metrics.csv``

A search tells only these:

``plan``
    ``trials``, ``finished`` (of them before, in a search that goes on), ``max_epochs``,
    ``metric``, ``mode`` (``max`` or ``min``), ``lines``
``trial``
    whenever a trial starts, ends an epoch or ends: its row of ``trials.csv``, with ``status``
    also ``running``, ``settings`` (the searched ones) and ``value`` (of the metric, at the best
    epoch so far)
"""

from collections.abc import Callable
from typing import Any

Event = dict[str, Any]
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A listener that does nothing."""
