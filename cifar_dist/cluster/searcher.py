"""The order in which Ray Tune gets trials, and how many at a time; in the driver."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ray.tune.search import Searcher

from cifar_dist.cluster import ray_internals
from cifar_dist.cluster.resources import room, worker_resources
from cifar_dist.config.tune import TuneConfig
from cifar_dist.search.suggestions import Optuna
from cifar_dist.search.trials import TrialTable

SLOTS_KNOWN_S = 5
"""How long the number of trials that fit on the cluster is kept before it is counted again."""


class OfTheDriver:
    """Base of objects that stay in the driver, where Tune would copy and pickle them."""

    def __deepcopy__(self, memo: object) -> Any:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}


class NumberedTrials(OfTheDriver, Searcher):
    """Searcher that gives Tune the remaining trials by their numbers, as there is room."""

    def __init__(
        self, numbers: list[int], suggestions: Optuna | None, trial_table: TrialTable
    ) -> None:
        super().__init__(metric=trial_table.config.metric, mode=trial_table.config.mode)
        self._left = list(reversed(numbers))
        self._suggestions = suggestions
        self._trial_table = trial_table
        self._live: dict[str, int] = {}
        self._slots, self._slots_known_until = 0, 0.0

    def suggest(self, trial_id: str) -> Any:
        if not self._left:
            return Searcher.FINISHED
        # Tune also asks for trials that would only wait for a place. Drawn when there is room,
        # Optuna's values take account of all trials that have ended by then.
        if len(self._live) >= self._room():
            return None
        # Ascending, since ASHA judges a trial only when those of lower number are judged: one that
        # started early would run beyond its rung while it waits.
        number = self._left.pop()
        drawn = self._draw(number)
        self._trial_table.add_trial(number, drawn)
        self._live[trial_id] = number
        return {"number": number, "drawn": dict(drawn)}

    def _room(self) -> int:
        """Return how many trials may run at a time."""
        if time.monotonic() > self._slots_known_until:
            self._slots = slots(self._trial_table.config)
            self._slots_known_until = time.monotonic() + SLOTS_KNOWN_S
        return self._slots

    def _draw(self, number: int) -> Mapping[str, Any]:
        if self._suggestions is not None:
            return self._suggestions.draw(number)
        drawn = self._trial_table.drawn(number)
        assert drawn is not None  # all were, before the search began
        return drawn

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: searches learn from trials that have ended."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        number = self._live.pop(trial_id)
        if self._suggestions is not None:
            self._suggestions.observe(number, self._trial_table.row(number))


def slots(config: TuneConfig) -> int:
    """Return how many trials run at a time on the cluster that this process is connected to.

    On one that grows one more, since only what waits makes it grow.
    """
    there = max(room(worker_resources(config.trial_base)) // config.workers, 1)
    there += ray_internals.autoscales()
    return min(there, config.max_concurrent or there)
