"""How ranks agree on the step at which all of them save."""

from __future__ import annotations

import asyncio
import random

import pytest

from cifar_dist.cluster.coordinator import Coordinator, _Request
from cifar_dist.events import Order, Warned


class Rank:
    """A rank of a training: it ends a step when all others have begun it too."""

    def __init__(self, number: int, hears_after: int) -> None:
        self.number, self.hears_after = number, hears_after
        self.done = 0
        self.begun = 1
        self.acted_at: int | None = None


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(50))
def test_all_ranks_act_at_the_same_step(world_size: int, seed: int) -> None:
    chance = random.Random(seed)
    request = _Request(1, Order.STOP)
    ranks = [Rank(number, chance.randrange(10)) for number in range(world_size)]
    for _ in range(10_000):
        waiting = [rank for rank in ranks if rank.acted_at is None]
        if not waiting:
            break
        # A collective: nobody ends a step before everybody has begun it.
        able = [rank for rank in waiting if all(other.begun > rank.done for other in ranks)]
        assert able, "a rank waits for one that has stopped"
        rank = chance.choice(able)
        rank.done += 1
        if rank.done >= rank.hears_after:
            answer = request.order_after("a start", world_size, rank.number, rank.done)
            if answer is Order.STOP:
                rank.acted_at = rank.done
                continue
        rank.begun = rank.done + 1
    assert len({rank.acted_at for rank in ranks}) == 1
    # As soon as the last one has heard, but for the step that others may have begun.
    assert ranks[0].acted_at <= max(1, *(rank.hears_after for rank in ranks)) + 1


def test_new_workers_agree_anew() -> None:
    request = _Request(1, Order.SAVE)
    assert request.order_after("first", 2, 0, 7) is Order.CONTINUE
    # Rank 1 is killed; the workers that replace them come from an older checkpoint.
    assert request.order_after("second", 2, 1, 3) is Order.CONTINUE
    assert request.order_after("second", 2, 0, 4) is Order.SAVE
    assert request.order_after("second", 2, 1, 4) is Order.SAVE


def test_events_are_taken_when_there_are_some_or_when_woken() -> None:
    async def take() -> None:
        coordinator = Coordinator.__ray_metadata__.modified_class()
        waiting = asyncio.create_task(coordinator.take())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await coordinator.put(Warned("first"))
        assert await waiting == [Warned("first")]
        waiting = asyncio.create_task(coordinator.take())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await coordinator.wake()
        assert await waiting == []
        await coordinator.put(Warned("second"))
        await coordinator.wake()
        assert await coordinator.take() == [Warned("second")]

    asyncio.run(asyncio.wait_for(take(), 10))
