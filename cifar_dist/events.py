"""The typed events of a run or a search.

A run sends `Plan`, `Waiting`, `Started`, `WorkersLost`, `Warned`, `StepDone` and `EpochDone`; a
search sends `SearchPlan`, `Waiting`, `Warned` and `TrialUpdated`. `WorkerRaised` and `Fatal` go
from workers to their driver, which turns them into the run's end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal


@dataclass(frozen=True)
class Event:
    """Something that happened; subclasses say what."""


Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Plan(Event):
    """A run is about to start: all that can be checked beforehand is checked."""

    max_epochs: int
    steps_per_epoch: int
    lines: Sequence[str]
    """Work and place of the run, formatted for display."""


@dataclass(frozen=True)
class SearchPlan(Event):
    """A search is about to start: all that can be checked beforehand is checked."""

    max_epochs: int
    """At most, of a trial."""
    trials: int
    finished: int
    """Trials of those that ended before, in a search that is resumed."""
    metric: str
    mode: Literal["max", "min"]
    lines: Sequence[str]
    """Work and place of the search, formatted for display."""


@dataclass(frozen=True)
class Waiting(Event):
    """The cluster is too small, and is waited for; sent before the plan."""

    message: str
    """For what and how long, in one line."""


@dataclass(frozen=True)
class Started(Event):
    """Workers begin to train; sent once more at each restart."""

    world_size: int
    checkpoint: str | None
    """The checkpoint that they resume from; None from the beginning."""


@dataclass(frozen=True)
class WorkersLost(Event):
    """Workers ended that should not have; a restart follows, or the run's end."""

    message: str
    """Which, and how, in one line."""


@dataclass(frozen=True)
class Warned(Event):
    """Something went wrong without ending the run."""

    message: str
    """What, in one line."""


@dataclass(frozen=True)
class StepDone(Event):
    """A step is done; sent a few times a second."""

    epoch: int
    """1-based."""
    step: int
    """Of the epoch, 1-based."""
    # Of rank 0 alone, since values of all ranks would cost a collective at every step.
    loss: float
    """Of this step, on rank 0."""
    accuracy: float
    """Of the epoch so far, on rank 0."""
    images_per_second: float
    """Of the epoch so far, over all ranks."""


@dataclass(frozen=True)
class EpochDone(Event):
    """An epoch is done, and saved if it is to be."""

    row: Mapping[str, Any]
    """Its row of ``metrics.csv``."""


@dataclass(frozen=True)
class TrialUpdated(Event):
    """A trial has started, has ended an epoch, or has ended."""

    trial_id: str
    status: Literal["running", "completed", "stopped", "failed", "unfinished"]
    settings: Mapping[str, Any]
    """Its values of the searched settings."""
    epochs: int
    """Epochs that count: of a stopped trial, up to where it was stopped."""
    best_epoch: int | None
    """1-based; None before the first epoch's end, as are the following values."""
    value: float | None
    """The search's metric at the best epoch."""
    seconds: float
    """Time of its epochs, those too that do not count."""
    reason: str | None
    """Why it did not reach its last epoch, where that is no error."""
    error: str | None
    """Why it failed."""


@dataclass(frozen=True)
class WorkerRaised(Event):
    """A worker has raised an exception that a restart may mend."""

    message: str
    """Its rank and the traceback."""


@dataclass(frozen=True)
class Fatal(Event):
    """A worker has raised an exception that no restart mends."""

    error: Exception


INTERRUPTED = Warned("interrupted: saving a checkpoint; once more to stop without")
"""Sent when a person or the system has asked a run to stop."""


class RestartCounter:
    """A listener that counts starts and losses of a run's workers, and passes events on.

    Args:
        listener: gets every event.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.starts = 0
        self.losses = 0
        """How often workers were lost."""

    def __call__(self, event: Event) -> None:
        """Count an event and pass it on."""
        self.starts += isinstance(event, Started)
        self.losses += isinstance(event, WorkersLost)
        self.listener(event)

    @property
    def restarts(self) -> int:
        """How often workers were replaced."""
        # They may be lost before they have started, and be replaced without having been lost.
        return max(self.starts - 1, self.losses, 0)


class Order(Enum):
    """The order for a rank that has come to a step's or an epoch's end."""

    CONTINUE = "continue"
    SAVE = "save a checkpoint and continue"
    STOP = "save a checkpoint and stop"


Ask = Callable[[int], Order]
"""Called on every rank with the steps done since the run's start. All ranks must get the same
answer at the same step."""


def ignore(event: Event) -> None:
    """Ignore an event, as the listener where nobody watches."""


def always_continue(step: int) -> Order:
    """Continue, as where nobody interrupts."""
    return Order.CONTINUE
