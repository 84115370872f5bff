"""Notices of nodes that are about to go, in a run's driver."""

from __future__ import annotations

import time
from typing import Any

from cifar_dist.cluster import ray_internals
from cifar_dist.events import Listener, Order, Warned

LOOK_FOR_NOTICES_S = 5
"""How often the cluster is asked which nodes are about to go."""


class Notices:
    """A check that has a checkpoint written when the cluster says that a node is about to go."""

    def __init__(self, coordinator: Any, listener: Listener) -> None:
        self._coordinator = coordinator
        self._listener = listener
        self._known: set[str] = set()
        self._looked = 0.0

    def look(self) -> None:
        """Look, unless that was a moment ago."""
        if time.monotonic() - self._looked < LOOK_FOR_NOTICES_S:
            return
        self._looked = time.monotonic()
        leaving = ray_internals.draining_nodes()
        if new := leaving - self._known:
            self._known |= new
            self._coordinator.request.remote(Order.SAVE)
            nodes = ", ".join(sorted(node[:8] for node in new))
            said = f"node {nodes} is about to go: saving a checkpoint"
            self._listener(Warned(said))
