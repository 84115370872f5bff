"""Events: all of them are documented and can be sent; restarts are counted."""

from __future__ import annotations

import pickle

from cifar_dist import events
from cifar_dist.errors import UserError
from cifar_dist.events import Event, Fatal, RestartCounter, Started, Warned, WorkersLost


def test_the_modules_docstring_names_every_event() -> None:
    assert events.__doc__ is not None
    kinds = [kind.__name__ for kind in Event.__subclasses__()]
    assert len(kinds) > 10
    assert [name for name in kinds if f"`{name}`" not in events.__doc__] == []


def test_an_event_survives_the_way_from_a_worker() -> None:
    sent = Fatal(UserError("--data-dir data: holds other data"))
    received = pickle.loads(pickle.dumps(sent))
    assert type(received.error) is UserError
    assert str(received.error) == str(sent.error)


def test_restarts_are_counted_whether_workers_had_started_or_were_lost() -> None:
    heard: list[Event] = []
    counter = RestartCounter(heard.append)
    assert counter.restarts == 0
    counter(WorkersLost("process of worker 0 died"))  # before they have started
    assert (counter.restarts, counter.losses) == (1, 1)
    for _ in range(3):  # the second time more workers came, and none was lost
        counter(Started(world_size=2, checkpoint=None))
    assert (counter.restarts, counter.losses) == (2, 1)
    counter(Warned("a warning is passed on too"))
    assert [type(event) for event in heard] == [WorkersLost, *[Started] * 3, Warned]
