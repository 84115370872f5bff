"""The actor between a run's driver and its workers, and both sides' ends of it.

Its state outlives every start of the workers, and a restart of Ray Train's controller.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cifar_dist.cluster.progress import RankProgress, Stall
from cifar_dist.events import Event, Fatal, Order


@dataclass
class _Request:
    """An order, and the step after which the ranks of one start have agreed to execute it."""

    number: int
    order: Order
    start: str = ""
    passed: dict[int, int] = field(default_factory=dict)
    """By rank: the last step after which it was let continue."""
    at: int | None = None
    """The step after which all ranks execute it."""

    def order_after(self, start: str, world_size: int, rank: int, step: int) -> Order:
        """Return what a rank does after a step.

        Ranks learn of a request at different steps. Each that has learnt of it asks before it
        continues, so once all have asked, the farthest step that any may have begun is known: all
        execute the order after that one.
        """
        if start != self.start:  # new workers, after a failure
            self.start, self.passed, self.at = start, {}, None
        others = [passed + 1 for other, passed in self.passed.items() if other != rank]
        # Decided once: a rank that asks later must find the same step, or it would save at another
        # one than the ranks that have already been answered.
        if self.at is None and len(others) == world_size - 1:
            self.at = max([step, *others])
        if step == self.at:
            return self.order
        self.passed[rank] = step
        return Order.CONTINUE


# No CPU: by default an actor is placed only where one is free, and the workers of other trials may
# hold all of them until their trials end.
@ray.remote(num_cpus=0)
class Coordinator:
    """Actor that carries events from rank 0 to the driver, and orders from the driver to all ranks.

    In a trial it also holds every rank at an epoch's end until the scheduler has decided.

    Args:
        wait: hold the ranks.
    """

    def __init__(self, wait: bool = False) -> None:
        self._events: list[Event] = []
        self._fatal: Exception | None = None
        self._released_to = 0 if wait else sys.maxsize
        self._stopped = False
        self._woken = False
        self._requests = 0
        self._request: _Request | None = None
        self._changed = asyncio.Condition()
        self._progress = RankProgress()

    async def report_progress(
        self, start: str, world_size: int, rank: int, marks: int, usual_s: float | None
    ) -> None:
        """Take a rank's report of how far it is."""
        self._progress.report(start, world_size, rank, marks, usual_s)

    async def leave(self, start: str, rank: int) -> None:
        """Take note that a rank has ended its training."""
        self._progress.leave(start, rank)

    async def stall(self) -> Stall | None:
        """Return which ranks the others wait for at the moment, and since when."""
        return self._progress.stall()

    async def forget_progress(self) -> None:
        """Forget the ranks, which are about to be replaced."""
        self._progress.forget()

    async def put(self, event: Event) -> None:
        """Add an event."""
        if isinstance(event, Fatal):
            # Kept outside the events, which `take` empties: Ray restarts workers after any error,
            # and the new ones ask for it in order to end before they train.
            self._fatal = event.error
        async with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    async def fatal_error(self) -> Exception | None:
        """Return the error of a worker that no restart mends, if there was one."""
        return self._fatal

    async def take(self) -> list[Event]:
        """Return all events since the last call, in order; waits for one, or for `wake`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._events or self._woken)
        # Nothing suspends between the read and the reset, so no event can be added in between and
        # lost.
        taken, self._events, self._woken = self._events, [], False
        return taken

    async def wake(self) -> None:
        """Make `take` return at once, with the events that there are."""
        async with self._changed:
            self._woken = True
            self._changed.notify_all()

    async def release(self, epoch: int, stop: bool = False) -> None:
        """Let ranks continue after an epoch (1-based), or make them stop after the next one."""
        async with self._changed:
            self._released_to = max(self._released_to, epoch)
            self._stopped = self._stopped or stop
            self._changed.notify_all()

    async def may_continue(self, epoch: int) -> bool:
        """Return whether a rank that ended an epoch (1-based) continues; waits for `release`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._stopped or epoch <= self._released_to)
        return not self._stopped

    async def request(self, order: Order) -> int:
        """Ask all ranks to save, or to save and stop, at a step that they agree on.

        Returns:
            The request's number.
        """
        async with self._changed:
            # An open stop is never replaced: a node's notice that comes after an interruption would
            # turn it into a save, and the run would continue.
            if self._request is None or self._request.order is not Order.STOP:
                self._requests += 1
                self._request = _Request(self._requests, order)
                self._changed.notify_all()
            return self._request.number

    async def wait_requested(self, after: int) -> int:
        """Wait for an open request with a number above ``after``, and return its number."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._request is not None and self._request.number > after
            )
            assert self._request is not None
            return self._request.number

    async def order_after(
        self, start: str, world_size: int, rank: int, step: int
    ) -> tuple[int, Order] | None:
        """Return the open request's number, and what a rank that knows of it does after a step."""
        if self._request is None:
            return None
        return self._request.number, self._request.order_after(start, world_size, rank, step)

    async def complete(self, number: int) -> None:
        """Close a request: its checkpoint is written."""
        async with self._changed:
            if self._request is not None and self._request.number <= number:
                self._request = None
                self._changed.notify_all()

    async def wait_completed(self, number: int) -> None:
        """Wait until a request is closed."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._request is None or self._request.number > number
            )


def make_coordinator(wait: bool = False) -> Any:
    """Start a `Coordinator` on this process's node, so that no other node's loss takes it along.

    Args:
        wait: hold every rank at an epoch's end until ``release`` is called, as a trial needs it.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Coordinator.options(scheduling_strategy=here).remote(wait)  # type: ignore[attr-defined]


class Events:
    """The driver's end: long-polls the coordinator, so that an idle driver uses no CPU.

    A call to the coordinator every now and then would interrupt training steps.

    Args:
        coordinator: the run's.
    """

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._coming = coordinator.take.remote()

    def take(self, last: bool = False) -> list[Event]:
        """Return the events that have come, in order, without waiting.

        Args:
            last: include those that are on their way: whoever sent them has ended.

        Raises:
            ray.exceptions.RayError: the coordinator is lost.
        """
        events: list[Event] = []
        # Only the pending call is looked at: a new one for each look would wake the coordinator's
        # process several times a second, on cores that train.
        if ray.wait([self._coming], timeout=0)[0]:
            events += self._arrived()
        if last:
            # Without it the pending call would wait for an event that nobody is left to send.
            self._coordinator.wake.remote()
            events += self._arrived()
        return events

    def _arrived(self) -> list[Event]:
        events: list[Event] = ray.get(self._coming)
        self._coming = self._coordinator.take.remote()
        return events


class RequestListener:
    """A rank's end: a thread waits for requests, so that without one they cost a step nothing.

    Args:
        coordinator: the run's.
        start: names this start of the workers, on all of its ranks.
        world_size: number of ranks.
        rank: this one's.
    """

    def __init__(self, coordinator: Any, start: str, world_size: int, rank: int) -> None:
        self._coordinator = coordinator
        self._who = (start, world_size, rank)
        self._notified = threading.Event()
        self._handled = 0
        self._saved: int | None = None
        # A daemon, since it sits in a call that may never return and must not keep the worker's
        # process from ending.
        threading.Thread(target=self._wait, daemon=True).start()

    def ask(self, step: int) -> Order:
        """Return what to do after a step, counted from the run's start; see `events.Ask`."""
        if self._saved is not None:
            # One step after the one at which it was ordered: its checkpoint is written.
            self._coordinator.complete.remote(self._saved)
            self._saved = None
        if not self._notified.is_set():
            return Order.CONTINUE
        answer = ray.get(self._coordinator.order_after.remote(*self._who, step))
        if answer is not None:
            self._handled, order = answer
            if order is Order.CONTINUE:  # not yet: asked again after the next step
                return order
            self._saved = self._handled
        # Cleared before the next thread starts: that one may be notified at once, and its request
        # would be lost.
        self._notified.clear()
        threading.Thread(target=self._wait, daemon=True).start()
        return Order.CONTINUE if answer is None else order

    def close(self) -> None:
        """Close the open request: training has ended, and nothing more will be saved for it."""
        # A request that came after the last step was never handled, and has a higher number. Left
        # open, it would hold up a resize for `SAVE_BEFORE_RESIZE_S`.
        self._coordinator.complete.remote(self._saved or self._handled + 1)

    def _wait(self) -> None:
        try:
            ray.get(self._coordinator.wait_requested.remote(self._handled))
        except ray.exceptions.RayError:
            return  # the run is over, and its coordinator with it
        self._notified.set()
