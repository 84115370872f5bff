"""Sources of trials' values: draws that are known beforehand, or Optuna."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from cifar_dist.config.tune import TuneConfig
from cifar_dist.errors import UserError
from cifar_dist.search.space import Domain, Space
from cifar_dist.search.trials import TrialTable


def drawn_values(config: TuneConfig, space: Space) -> dict[int, Mapping[str, Any]]:
    """Return all trials' values by number, for a search that draws them beforehand.

    Raises:
        UserError: a draw that no trial could run.
    """
    if config.search == "grid":
        rows = space.combinations()
    else:
        rows = list(space.draws(config.train.seed, config.num_samples))
    # Every draw is checked before anything starts: two values may each be allowed and contradict
    # each other, which would fail a trial hours later.
    for values in rows:
        space.configured(config.trial_base, values)
    return dict(enumerate(rows))


class Optuna:
    """Values that Optuna suggests (its TPE sampler), knowing the trials that have ended.

    Which have ended when a trial starts depends on how fast they ran, so, other than with
    draws, two searches of the same seed try different values.

    Raises:
        UserError: Optuna is not installed.
    """

    def __init__(self, config: TuneConfig, space: Space, trial_table: TrialTable) -> None:
        try:
            import optuna
        except ImportError:
            raise UserError(
                "--search optuna: needs the package optuna; install cifar-dist[optuna], or "
                "give --search random"
            ) from None
        # Optuna logs a line for each trial, which would break the live table.
        logging.getLogger("optuna").setLevel(logging.ERROR)
        self._optuna = optuna
        self._trial_table = trial_table
        self._metric, self._mode = config.metric, config.mode
        self._distributions = {
            name: _distribution(optuna, domain) for name, domain in space.domains.items()
        }
        self._study = optuna.create_study(
            direction="maximize" if config.mode == "max" else "minimize",
            # With `constant_liar` trials that still run count as bad: without it, trials that are
            # drawn together would get nearly the same values.
            sampler=optuna.samplers.TPESampler(seed=config.train.seed, constant_liar=True),
        )
        self._asked: dict[int, Any] = {}

    def draw(self, number: int) -> Mapping[str, Any]:
        """Return the values of a trial, by its number from 0."""
        known = self._trial_table.drawn(number)
        if known is not None:  # of a search that is resumed
            # Drawn again, an unfinished trial would get other values than its checkpoints were
            # trained with. The next `ask` returns the enqueued ones.
            self._study.enqueue_trial(dict(known))
        self._asked[number] = self._study.ask(self._distributions)
        return known if known is not None else dict(self._asked[number].params)

    def observe(self, number: int, row: Mapping[str, Any]) -> None:
        """Learn from a trial that has ended; ``row`` is its row of the table."""
        failed = self._optuna.trial.TrialState.FAIL
        value = row[self._metric] if row["status"] in ("completed", "stopped") else None
        if value is not None and not math.isfinite(value):
            # Optuna refuses NaN, and takes the worst value that there is.
            value = math.inf if self._mode == "min" else -math.inf
        if number in self._asked:
            trial = self._asked.pop(number)
            # A failed trial has no value, and a made-up bad one would turn the sampler away from
            # values that may be good.
            self._study.tell(trial, value, state=failed if value is None else None)
        elif value is not None:  # it ended before the search was resumed
            values = {name: row[name] for name in self._distributions}
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    params=values, distributions=self._distributions, value=value
                )
            )


def _distribution(optuna: Any, domain: Domain) -> Any:
    of = optuna.distributions
    if domain.listed:
        return of.CategoricalDistribution(domain.values)
    low, high = domain.values[:2]
    if domain.kind == "randint":
        return of.IntDistribution(low, high - 1)
    if domain.kind == "quniform":
        whole = all(isinstance(each, int) for each in domain.values)
        kind = of.IntDistribution if whole else of.FloatDistribution
        return kind(low, high, step=domain.values[2])
    return of.FloatDistribution(low, high, log=domain.kind == "loguniform")
