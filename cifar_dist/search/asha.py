"""ASHA, judged in the order of the trials' numbers: the same trials stop however fast they run.

The rule is asynchronous successive halving (Li et al., "A system for massively parallel
hyperparameter tuning", 2020), with the rungs and the cut of Ray Tune's ``ASHAScheduler``. Ray
compares a trial with those whose results came in before. Here it is compared with those of lower
number that reached the rung, and by its best value so far instead of its last. So

- what is decided follows from the trials' results alone, not from which of two machines was
  faster or from a driver that was killed and resumed;
- no trial that was stopped is the best: at the rung, one that continues was better.

A decision that waits for a trial of lower number does not keep the trial from running on; what it
ran beyond the rung where it turns out to be stopped does not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Mode = Literal["max", "min"]
"""Whether a high or a low value of a metric is good."""


def comparable(value: Any, mode: Mode) -> float:
    """Return a metric's value so that higher is better; missing or not finite, it is the worst.

    Comparisons with NaN are false: ``min`` and ``max`` would keep it where it comes first, and a
    trial that diverged would be the best.
    """
    if value is None or not math.isfinite(value):
        return -math.inf
    return float(value) if mode == "max" else -float(value)


@dataclass(frozen=True)
class Cut:
    """Why a trial was stopped."""

    epoch: int
    """The rung's epoch (1-based)."""
    value: float
    """The trial's best value up to there."""
    cutoff: float
    """The value that it would have had to reach."""


@dataclass
class _Rung:
    epoch: int
    next_trial: int = 0
    """The lowest number that is not judged yet."""
    values: list[float] = field(default_factory=list)
    """Of the trials that reached the rung, finite, higher is better, by their numbers."""


class InOrder:
    """Judge of trials at rungs, in the order of their numbers, as their values come in.

    Args:
        grace_period: epochs of the first rung.
        reduction_factor: one trial in this many continues, and a rung has this many times the
            epochs of the one before.
        max_epochs: epochs of a trial that is not stopped.
        mode: whether high or low values are good.
    """

    def __init__(
        self,
        grace_period: int,
        reduction_factor: float,
        max_epochs: int,
        mode: Mode = "max",
    ) -> None:
        self.reduction_factor = reduction_factor
        self._mode = mode
        # Losses are negated, so that higher is better in all comparisons below.
        self._sign = 1.0 if mode == "max" else -1.0
        self._rungs = [
            _Rung(epoch) for epoch in rung_epochs(grace_period, reduction_factor, max_epochs)
        ]
        self._best: dict[int, list[float]] = {}
        self._ended: set[int] = set()
        self.cuts: dict[int, Cut] = {}
        """By number, the trials that were stopped."""

    def add(self, trial: int, epoch: int, value: float | None) -> None:
        """Take a trial's value at an epoch; epochs come in order, known ones again are ignored.

        Args:
            trial: its number, from 0.
            epoch: 1-based.
            value: of the metric; one that is not finite is the worst.
        """
        best = self._best.setdefault(trial, [])
        if epoch <= len(best):
            return
        assert epoch == len(best) + 1, f"trial {trial}: epoch {epoch} after {len(best)}"
        signed = comparable(value, self._mode)
        best.append(max(best[-1], signed) if best else signed)
        self._judge()

    def end(self, trial: int) -> None:
        """Take note that a trial, run or not, will give no more values."""
        self._ended.add(trial)
        self._judge()

    def _judge(self) -> None:
        for rung in self._rungs:  # from the lowest: a trial that is stopped there is in no other
            while self._judge_next(rung):
                rung.next_trial += 1

    def _judge_next(self, rung: _Rung) -> bool:
        """Judge the next trial at a rung; False if that has to wait."""
        trial = rung.next_trial
        if trial in self.cuts and self.cuts[trial].epoch < rung.epoch:
            return True
        if any(trial >= lower.next_trial for lower in self._rungs if lower.epoch < rung.epoch):
            return False  # it may still turn out to be stopped before
        best = self._best.get(trial, [])
        if len(best) < rung.epoch:
            # A trial that failed before this rung is passed over: waiting for it would keep all
            # trials of higher number undecided.
            return trial in self._ended
        value = best[rung.epoch - 1]
        if rung.values:
            # Ray's: with a reduction factor of 3, what two thirds of the others are below.
            cutoff = float(np.percentile(rung.values, (1 - 1 / self.reduction_factor) * 100))
            if value < cutoff:
                self.cuts[trial] = Cut(rung.epoch, self._sign * value, self._sign * cutoff)
        # With infinite values among them the percentile could be -inf or NaN, and stop nobody.
        if math.isfinite(value):
            rung.values.append(value)
        return True


def rung_epochs(grace_period: int, reduction_factor: float, max_epochs: int) -> list[int]:
    """Return the epochs at whose end trials are judged, all below ``max_epochs``."""
    epochs: list[int] = []
    reached = float(grace_period)
    while math.ceil(reached) < max_epochs:
        # With a factor near 1 several rungs fall on one epoch, where a trial would be judged twice.
        if math.ceil(reached) not in epochs:
            epochs.append(math.ceil(reached))
        reached *= reduction_factor
    return epochs
