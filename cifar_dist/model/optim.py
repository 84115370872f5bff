"""Optimizers and learning rate schedules, by the names that `cifar_dist.registry` gives them.

An optimizer is a function of the parameters (or groups of them) and the config. A schedule is one
of torch's schedulers, made of an optimizer, the config and the number of optimizer steps in an
epoch; its ``interval`` says whether it steps after each ``step`` or ``epoch``. Its entry in the
registry says whether its rates depend on the number of epochs, and whether it has a warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer

from cifar_dist.config.train import TrainConfig
from cifar_dist.registry import OPTIMIZERS, SCHEDULES

Parameters: TypeAlias = Iterable[nn.Parameter] | list[dict[str, Any]]
Interval: TypeAlias = Literal["step", "epoch"]

SGD_MOMENTUM = 0.9
RISE = {"cosine": 0.3, "linear": 0.2}
"""Part of a cycle in which the learning rate rises, by `anneal`, where `warmup_epochs` is not set:
torch's own, and that of cifar10-fast and hlb-CIFAR10."""
RISE_FROM = 25.0
"""Divides a cycle's highest learning rate to give its first one: torch's default."""


def optimizer_and_schedule(
    network: nn.Module, config: TrainConfig, steps_per_epoch: int
) -> OptimizerLRSchedulerConfig:
    """Return the optimizer and the schedule that a config names, as Lightning takes them.

    Args:
        network: all of its parameters are trained.
        config: names them, and holds their settings.
        steps_per_epoch: optimizer steps in an epoch.
    """
    optimizer = make_optimizer(network, config)
    schedule = SCHEDULES[config.schedule](optimizer, config, steps_per_epoch)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": schedule.interval},
    }


def make_optimizer(network: nn.Module, config: TrainConfig) -> Optimizer:
    """Return the optimizer that a config names, of a network's parameters."""
    parameters = network.parameters() if config.decay_norm_bias else decay_groups(network)
    optimizer: Optimizer = OPTIMIZERS[config.optimizer](parameters, config)
    return optimizer


def decay_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Return a network's parameters as two groups of an optimizer, the second without weight decay.

    Without decay are vectors and scalars: biases, and the scales and offsets of normalisation
    layers. A network that lacks either kind has one group.
    """
    decayed = [each for each in network.parameters() if each.ndim > 1]
    others = [each for each in network.parameters() if each.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


# Fused: one pass over the weights in place of a dozen, on the CPU too.


def adamw(parameters: Parameters, config: TrainConfig) -> Optimizer:
    """Return AdamW."""
    return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay, fused=True)


def sgd(parameters: Parameters, config: TrainConfig) -> Optimizer:
    """Return SGD with Nesterov momentum."""
    return torch.optim.SGD(
        parameters,
        config.lr,
        momentum=SGD_MOMENTUM,
        weight_decay=config.weight_decay,
        nesterov=True,
        fused=True,
    )


class StepLR(torch.optim.lr_scheduler.StepLR):
    """A learning rate that drops by ``gamma`` every ``step_size`` epochs."""

    interval: ClassVar[Interval] = "epoch"

    def __init__(self, optimizer: Optimizer, config: TrainConfig, steps_per_epoch: int) -> None:
        super().__init__(optimizer, config.step_size, config.gamma)


class OneCycle(torch.optim.lr_scheduler.OneCycleLR):
    """A learning rate that rises to ``lr`` and falls from there to the last step.

    It rises over ``warmup_epochs``, along the curve ``anneal``, and ends at ``final_lr_factor``.
    """

    interval: ClassVar[Interval] = "step"

    def __init__(self, optimizer: Optimizer, config: TrainConfig, steps_per_epoch: int) -> None:
        total_steps = config.max_epochs * steps_per_epoch
        rise = RISE[config.anneal]
        if config.warmup_epochs is not None:
            rise = config.warmup_epochs / config.max_epochs
        if rise * total_steps < 2:
            rise = 0.0  # nothing to rise over, and over exactly one step torch divides by zero
        # torch divides the cycle's first rate by final_div_factor, not its highest one.
        end = config.final_lr_factor
        super().__init__(
            optimizer,
            max_lr=config.lr,
            total_steps=total_steps,
            pct_start=rise,
            anneal_strategy="cos" if config.anneal == "cosine" else "linear",
            div_factor=RISE_FROM,
            final_div_factor=1 / (RISE_FROM * end) if end else math.inf,
        )


class Cosine(torch.optim.lr_scheduler.LambdaLR):
    """A learning rate that falls from ``lr`` along half a cosine (Loshchilov and Hutter, 2017).

    It rises to ``lr`` over ``warmup_epochs`` before, in a line, and ends at ``final_lr_factor``.
    """

    interval: ClassVar[Interval] = "step"

    def __init__(self, optimizer: Optimizer, config: TrainConfig, steps_per_epoch: int) -> None:
        rise = round((config.warmup_epochs or 0) * steps_per_epoch)
        fall, end = config.max_epochs * steps_per_epoch - rise, config.final_lr_factor

        def factor(step: int) -> float:
            if step < rise:
                return (step + 1) / (rise + 1)  # a first step at zero would change nothing
            # Lightning steps once more after the last step, for which the curve would turn.
            done = min((step - rise) / fall, 1.0)
            return end + (1 - end) * (1 + math.cos(math.pi * done)) / 2

        super().__init__(optimizer, factor)
