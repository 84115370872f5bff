"""ASHA in the order of the trials: Ray's rule, and the same trials stop whatever comes first."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest

from cifar_dist.search.asha import Cut, InOrder, rung_epochs

EPOCHS = 9


def curves(seed: int, trials: int = 20) -> list[list[float]]:
    """Accuracies by trial and epoch; they go up and down."""
    generator = random.Random(seed)
    quality = [generator.random() for _ in range(trials)]
    return [
        [min(each * epoch / EPOCHS + generator.gauss(0, 0.05), 1.0) for epoch in range(1, 10)]
        for each in quality
    ]


def judged(values: list[list[float]], arrival: list[tuple[int, int]], mode="max") -> InOrder:
    """Judge trials whose results come in the given order of (trial, epoch)."""
    asha = InOrder(1, 3, EPOCHS, mode)
    for trial, epoch in arrival:
        asha.add(trial, epoch, values[trial][epoch - 1])
        if epoch == EPOCHS:
            asha.end(trial)
    return asha


def in_order(values: list[list[float]]) -> list[tuple[int, int]]:
    return [(trial, epoch) for trial in range(len(values)) for epoch in range(1, EPOCHS + 1)]


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [((1, 3, 9), [1, 3]), ((2, 2, 16), [2, 4, 8]), ((1, 1.5, 4), [1, 2, 3]), ((4, 3, 4), [])],
)
def test_rungs_lie_below_the_last_epoch(settings, epochs) -> None:
    assert rung_epochs(*settings) == epochs


@pytest.mark.parametrize("seed", range(5))
def test_trials_one_after_the_other_stop_where_rays_scheduler_stops_them(seed: int) -> None:
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler

    values = curves(seed)
    rays = ASHAScheduler("epoch", "accuracy", "max", max_t=EPOCHS, reduction_factor=3)
    stopped = {}
    for number, of_epochs in enumerate(values):
        trial = SimpleNamespace(trial_id=str(number))
        rays.on_trial_add(None, trial)
        best = -math.inf
        for epoch, value in enumerate(of_epochs, start=1):
            best = max(best, value)
            result = {"epoch": epoch, "accuracy": best}
            if epoch == EPOCHS:
                break
            if rays.on_trial_result(None, trial, result) == TrialScheduler.STOP:
                stopped[number] = epoch
                break
    cuts = judged(values, in_order(values)).cuts
    assert {number: cut.epoch for number, cut in cuts.items()} == stopped
    assert len(stopped) > 5


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_arrival_changes_nothing(seed: int) -> None:
    values = curves(seed)
    generator = random.Random(seed)
    waiting = dict.fromkeys(range(len(values)), 1)
    arrival = []
    while waiting:  # any trial may be ahead of any other
        trial = generator.choice(list(waiting))
        arrival.append((trial, waiting[trial]))
        waiting[trial] += 1
        if waiting[trial] > EPOCHS:
            del waiting[trial]
    assert judged(values, arrival).cuts == judged(values, in_order(values)).cuts


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("seed", range(10))
def test_no_stopped_trial_is_the_best(seed: int, mode: str) -> None:
    values = curves(seed)
    cuts = judged(values, in_order(values), mode).cuts
    choose = max if mode == "max" else min
    last = {number: cut.epoch for number, cut in cuts.items()}
    counted = [choose(each[: last.get(number, EPOCHS)]) for number, each in enumerate(values)]
    assert counted.index(choose(counted)) not in cuts


def test_a_decision_waits_for_trials_of_lower_number() -> None:
    asha = InOrder(1, 3, EPOCHS)
    asha.add(1, 1, 0.1)
    asha.add(1, 2, 0.2)
    assert asha.cuts == {}
    asha.add(0, 1, 0.5)
    assert asha.cuts == {1: Cut(epoch=1, value=0.1, cutoff=0.5)}


def test_a_trial_that_failed_keeps_none_waiting() -> None:
    asha = InOrder(1, 3, EPOCHS)
    asha.add(1, 1, 0.5)
    asha.add(2, 1, 0.1)
    assert asha.cuts == {}
    asha.end(0)
    assert set(asha.cuts) == {2}


def test_epochs_that_come_again_after_a_restart_are_ignored() -> None:
    asha = InOrder(1, 3, EPOCHS)
    for value in (0.5, 0.9):
        asha.add(0, 1, value)
    asha.add(1, 1, 0.6)
    assert asha.cuts == {}


def test_values_that_are_not_finite_are_the_worst_and_no_measure_for_others() -> None:
    asha = InOrder(1, 3, EPOCHS)
    asha.add(0, 1, math.nan)
    asha.add(1, 1, 0.1)
    asha.add(2, 1, math.nan)
    asha.add(3, 1, 0.1)
    assert set(asha.cuts) == {2}


def test_low_values_are_good_where_they_are() -> None:
    asha = InOrder(1, 3, EPOCHS, "min")
    asha.add(0, 1, 1.5)
    asha.add(1, 1, 2.5)
    assert asha.cuts == {1: Cut(epoch=1, value=2.5, cutoff=1.5)}
