"""What goes between the driver and the workers of a run, whatever becomes of either."""

from __future__ import annotations

import asyncio
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cifar_dist.events import Event, Fatal, Order


@dataclass
class _Request:
    """An order, and what the ranks of one start have agreed on about where to carry it out."""

    number: int
    order: Order
    start: str = ""
    asked: dict[int, int] = field(default_factory=dict)
    """By rank: the step that it was last let past."""
    at: int | None = None
    """The step behind which all ranks carry it out."""

    def answer(self, start: str, world_size: int, rank: int, step: int) -> Order:
        """What a rank does behind a step.

        Ranks hear of a request at different steps. Each that has heard asks before it goes on, so
        once all have asked, the farthest step that any may have begun is known: that is where.
        """
        if start != self.start:  # new workers, after a failure
            self.start, self.asked, self.at = start, {}, None
        others = [passed + 1 for other, passed in self.asked.items() if other != rank]
        if self.at is None and len(others) == world_size - 1:
            self.at = max([step, *others])
        if step == self.at:
            return self.order
        self.asked[rank] = step
        return Order.GO_ON


@ray.remote(num_cpus=0)
class Coordinator:
    """Carries events from rank 0 to the driver, and orders from the driver to all ranks.

    In a trial it also holds every rank at an epoch's end until the scheduler has decided.

    Args:
        wait: hold the ranks.
    """

    def __init__(self, wait: bool = False) -> None:
        self._events: list[Event] = []
        self._hopeless: Exception | None = None
        self._let_run_to = 0 if wait else sys.maxsize
        self._stopped = False
        self._nudged = False
        self._requests = 0
        self._request: _Request | None = None
        self._changed = asyncio.Condition()

    async def put(self, event: Event) -> None:
        """Add an event."""
        if isinstance(event, Fatal):
            self._hopeless = event.error
        async with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    async def hopeless(self) -> Exception | None:
        """What a worker found wrong that no restart mends, if anything."""
        return self._hopeless

    async def take(self) -> list[Event]:
        """All events since the last call, in order; the answer waits for one, or for `nudge`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._events or self._nudged)
        taken, self._events, self._nudged = self._events, [], False
        return taken

    async def nudge(self) -> None:
        """Have `take` answer at once, with what there is."""
        async with self._changed:
            self._nudged = True
            self._changed.notify_all()

    async def go_on(self, epoch: int, stop: bool = False) -> None:
        """Let ranks run on behind an epoch's end (1-based), or make them stop at the next one."""
        async with self._changed:
            self._let_run_to = max(self._let_run_to, epoch)
            self._stopped = self._stopped or stop
            self._changed.notify_all()

    async def may_go_on(self, epoch: int) -> bool:
        """Whether a rank that ended an epoch (1-based) goes on; the answer waits for `go_on`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._stopped or epoch <= self._let_run_to)
        return not self._stopped

    async def request(self, order: Order) -> int:
        """Ask all ranks to save, or to save and stop, at a step that they agree on.

        Returns:
            The request's number.
        """
        async with self._changed:
            if self._request is None or self._request.order is not Order.STOP:
                self._requests += 1
                self._request = _Request(self._requests, order)
                self._changed.notify_all()
            return self._request.number

    async def requested(self, after: int) -> int:
        """The number of an open request above ``after``; the answer waits for one."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._request is not None and self._request.number > after
            )
            assert self._request is not None
            return self._request.number

    async def answer(
        self, start: str, world_size: int, rank: int, step: int
    ) -> tuple[int, Order] | None:
        """The open request's number, and what a rank that has heard of it does behind a step."""
        if self._request is None:
            return None
        return self._request.number, self._request.answer(start, world_size, rank, step)

    async def carried_out(self, number: int) -> None:
        """Close a request: its checkpoint is written."""
        async with self._changed:
            if self._request is not None and self._request.number <= number:
                self._request = None
                self._changed.notify_all()

    async def wait_carried_out(self, number: int) -> None:
        """Wait until a request is closed."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._request is None or self._request.number > number
            )


def make_coordinator(wait: bool = False) -> Any:
    """A `Coordinator` on this process's node: the loss of any other must not take it along.

    Args:
        wait: hold every rank at an epoch's end until ``go_on`` is called, as a trial needs it.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Coordinator.options(scheduling_strategy=here).remote(wait)  # type: ignore[attr-defined]


class Events:
    """The driver's ear for events: while there are none it costs the processors nothing.

    A call to the coordinator every now and then would be one that interrupts a training step.

    Args:
        coordinator: the run's.
    """

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._coming = coordinator.take.remote()

    def take(self, last: bool = False) -> list[Event]:
        """The events that have come, in order; does not wait.

        Args:
            last: those too that are on their way: whoever sent them has ended.

        Raises:
            ray.exceptions.RayError: the coordinator is lost.
        """
        events: list[Event] = []
        if ray.wait([self._coming], timeout=0)[0]:
            events += self._arrived()
        if last:
            self._coordinator.nudge.remote()
            events += self._arrived()
        return events

    def _arrived(self) -> list[Event]:
        events: list[Event] = ray.get(self._coming)
        self._coming = self._coordinator.take.remote()
        return events


class Orders:
    """A rank's ear for requests: costs a step nothing while there are none.

    Args:
        coordinator: the run's.
        start: names this start of the workers, on all of its ranks.
        world_size: number of ranks.
        rank: this one's.
    """

    def __init__(self, coordinator: Any, start: str, world_size: int, rank: int) -> None:
        self._coordinator = coordinator
        self._who = (start, world_size, rank)
        self._heard = threading.Event()
        self._handled = 0
        self._saved: int | None = None
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, step: int) -> Order:
        """What to do behind a step, counted from the run's start; see `events.Ask`."""
        if self._saved is not None:
            # Behind the step at which it was ordered: its checkpoint is written.
            self._coordinator.carried_out.remote(self._saved)
            self._saved = None
        if not self._heard.is_set():
            return Order.GO_ON
        answer = ray.get(self._coordinator.answer.remote(*self._who, step))
        if answer is not None:
            self._handled, order = answer
            if order is Order.GO_ON:  # not yet: asked again behind the next step
                return order
            self._saved = self._handled
        self._heard.clear()
        threading.Thread(target=self._listen, daemon=True).start()
        return Order.GO_ON if answer is None else order

    def close(self) -> None:
        """Nothing more is asked: whoever waits for a checkpoint has waited long enough."""
        self._coordinator.carried_out.remote(self._saved or self._handled + 1)

    def _listen(self) -> None:
        try:
            ray.get(self._coordinator.requested.remote(self._handled))
        except ray.exceptions.RayError:
            return  # the run is over, and its coordinator with it
        self._heard.set()
