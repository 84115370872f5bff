"""An optimizer and a schedule of somebody's own: registered, they train and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import Interrupted, UserError
from cifar_dist.registry import OPTIMIZERS, SCHEDULES
from tests.registering import register
from tests.training.small import STEPS, SignalAt, Small, TrainFew, same, small_network


def rmsprop(parameters: Any, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, config.lr, momentum=0.5)


class Cosine(torch.optim.lr_scheduler.CosineAnnealingLR):
    interval = "step"

    def __init__(self, optimizer: Any, config: TrainConfig, steps_per_epoch: int) -> None:
        super().__init__(optimizer, config.max_epochs * steps_per_epoch)


OWN = {"optimizer": "rmsprop", "schedule": "cosine", "max_epochs": 2}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch):
    register(monkeypatch, OPTIMIZERS, "rmsprop", rmsprop)
    register(monkeypatch, SCHEDULES, "cosine", Cosine, needs_horizon=True)
    with small_network(Small):
        yield


def test_what_is_registered_trains_and_resumes_to_the_bit(
    train_few: TrainFew, tmp_path: Path
) -> None:
    whole = train_few(tmp_path, "whole", **OWN)
    # A cosine's rate halfway, and before its last step.
    first, last = (row["lr"] for row in whole.outcome.history)
    assert 0.5e-3 < first < 0.7e-3
    assert 0 < last < 0.1e-3
    with pytest.raises(Interrupted):
        train_few(tmp_path, "cut", SignalAt(2, STEPS // 2), **OWN)
    same(train_few(tmp_path, "cut", resume=True, **OWN), whole)
    skipping = train_few(tmp_path, "skipping", on_nonfinite="skip", **OWN)
    assert skipping.outcome.weights_sha256 == whole.outcome.weights_sha256
    default = train_few(tmp_path, "default", max_epochs=2)
    assert default.outcome.weights_sha256 != whole.outcome.weights_sha256


def test_a_schedule_that_needs_the_horizon_keeps_it(train_few: TrainFew, tmp_path: Path) -> None:
    train_few(tmp_path, "run", **OWN)
    longer = {**OWN, "max_epochs": 3}
    with pytest.raises(UserError, match="--max-epochs 3: the run's schedule, cosine, spans 2 ep"):
        train_few(tmp_path, "run", resume=True, **longer)


def test_a_schedule_without_a_warm_up_refuses_one() -> None:
    with pytest.raises(UserError, match=r"--schedule cosine has no warm-up; .*\(onecycle\)"):
        TrainConfig(**OWN, warmup_epochs=1)
