"""Optimizers and schedules."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from cifar_dist.config.train import TrainConfig
from cifar_dist.model.optim import make_optimizer, optimizer_and_schedule
from cifar_dist.model.resnet import resnet18


def made_for(**settings) -> dict:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    return optimizer_and_schedule(network, TrainConfig(**settings), steps_per_epoch=7)


def test_adamw_and_steplr_are_as_set() -> None:
    made = made_for(lr=0.01, weight_decay=0.3, step_size=2, gamma=0.1)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    assert schedule["interval"] == "epoch"
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule["scheduler"].step()
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001])


def test_sgd_and_onecycle_are_as_set() -> None:
    made = made_for(optimizer="sgd", schedule="onecycle", lr=0.4, max_epochs=3)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["nesterov"]
    assert schedule["interval"] == "step"
    rates = []
    for _ in range(3 * 7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule["scheduler"].step()
    assert max(rates) == pytest.approx(0.4, rel=0.02)
    assert rates[-1] < rates[0] < max(rates)


def rates_of(steps_per_epoch: int = 7, **settings) -> list[list[float]]:
    """The learning rates of every step of a run, by parameter group."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10))
    config = TrainConfig(**{"optimizer": "sgd", "schedule": "onecycle", **settings})
    made = optimizer_and_schedule(network, config, steps_per_epoch)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(config.max_epochs * steps_per_epoch):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()  # after the last step too, as Lightning does
    return [list(each) for each in zip(*rates, strict=True)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_cycle_is_torchs_own_by_default(optimizer: str) -> None:
    (rates,) = rates_of(lr=0.3, max_epochs=10, optimizer=optimizer)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.3)
    torchs = torch.optim.lr_scheduler.OneCycleLR(plain, 0.3, 70, cycle_momentum=False)
    for rate in rates:
        assert rate == plain.param_groups[0]["lr"]  # to the last bit: golden runs rest on it
        plain.step()
        torchs.step()


def test_a_cycle_rises_over_the_warm_up_and_falls_straight_to_zero() -> None:
    rates, again = rates_of(
        lr=0.4, max_epochs=15, warmup_epochs=3, anneal="linear", final_lr_factor=0.0,
        decay_norm_bias=False,
    )  # fmt: skip
    assert again == rates
    # A fifth of the run is what a linear cycle rises over by itself.
    assert rates_of(lr=0.4, max_epochs=15, anneal="linear", final_lr_factor=0.0) == [rates]
    top = 3 * 7 - 1
    assert max(rates) == rates[top] == pytest.approx(0.4)
    assert rates[0] == pytest.approx(0.4 / 25)
    assert rates[-1] == 0
    rising, falling = rates[: top + 1], rates[top:]
    for part in (rising, falling):
        steps = [after - before for before, after in pairwise(part)]
        assert steps == pytest.approx([steps[0]] * len(steps))


def test_a_cosine_ends_at_zero_too() -> None:
    (rates,) = rates_of(lr=0.4, max_epochs=5, warmup_epochs=1.5, final_lr_factor=0.0)
    assert rates[-1] == pytest.approx(0, abs=1e-15)
    assert max(rates) == pytest.approx(0.4, rel=0.01)


@pytest.mark.parametrize("warmup_epochs", [0, 0.1, 1, 1.5, 2, 3.9, None])
@pytest.mark.parametrize("steps_per_epoch", [1, 2, 5, 7])
@pytest.mark.parametrize("max_epochs", [1, 4])
def test_any_warm_up_can_be_run(
    warmup_epochs: float | None, steps_per_epoch: int, max_epochs: int
) -> None:
    if warmup_epochs is not None and warmup_epochs >= max_epochs:
        return  # refused
    # torch's cycle divides by zero where the rate rises over exactly one step.
    (rates,) = rates_of(
        steps_per_epoch, lr=0.4, max_epochs=max_epochs, warmup_epochs=warmup_epochs, anneal="linear"
    )
    assert all(0 < rate <= 0.4 + 1e-12 for rate in rates)
    share = 0.2 * max_epochs if warmup_epochs is None else warmup_epochs
    if share * steps_per_epoch < 2:
        assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_spares_biases_and_normalisation_only(optimizer: str) -> None:
    network = resnet18(10, "cifar")
    settings = {"optimizer": optimizer, "lr": 0.5, "weight_decay": 0.25, "decay_norm_bias": False}
    made = make_optimizer(network, TrainConfig(**settings))
    in_groups = [each for group in made.param_groups for each in group["params"]]
    assert len(in_groups) == len(set(in_groups)) == len(list(network.parameters()))
    before = {name: each.detach().clone() for name, each in network.named_parameters()}
    for each in network.parameters():
        each.grad = torch.zeros_like(each)
    made.step()  # without gradients only decay moves anything
    norms = {name for name, each in network.named_modules() if isinstance(each, nn.BatchNorm2d)}
    for name, each in network.named_parameters():
        spared = name.endswith("bias") or name.rpartition(".")[0] in norms
        assert torch.equal(each, before[name]) == spared, name


def test_by_default_everything_decays() -> None:
    (group,) = make_optimizer(resnet18(10), TrainConfig(weight_decay=0.25)).param_groups
    assert group["weight_decay"] == 0.25


def test_cosine_is_torchs_annealing_after_a_rise() -> None:
    (whole,) = rates_of(schedule="cosine", lr=0.4, max_epochs=4, final_lr_factor=0.05)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.4)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=28, eta_min=0.4 * 0.05)
    for rate in whole:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step()
    (warm,) = rates_of(
        schedule="cosine", lr=0.4, max_epochs=4, warmup_epochs=1, final_lr_factor=0.0
    )
    assert warm[:8] == pytest.approx([0.4 * n / 8 for n in range(1, 9)])
    assert all(after < before for before, after in pairwise(warm[7:]))
