"""Runs of seconds: a small network on a few real digits, in this process."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from cifar_dist.config.train import TrainConfig
from cifar_dist.events import Event, StepDone
from cifar_dist.registry import NETWORKS
from cifar_dist.train import Trained
from tests.training.test_fit import without_timing

TrainFew = Callable[..., Trained]

STEPS = 6
"""Of an epoch: 144 images, 24 a step."""


class Small(nn.Module):
    """A small network with batch normalisation; what a test needs besides is in a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=4)
        self.bn1 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.disturbed(F.relu(self.bn1(self.conv1(images))))
        # Not the adaptive one, whose backward pass is not deterministic on a GPU.
        return self.fc(F.avg_pool2d(hidden, 2).flatten(1))

    def disturbed(self, hidden: Tensor) -> Tensor:
        return hidden


class Breaking(Small):
    """A small network whose training passes (0-based, over all networks) in ``breaks`` fail."""

    breaks: tuple[int, ...] = ()
    seen: ClassVar[list[dict[str, Tensor]]] = []
    """What the weights and statistics were before each training pass."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen.append({name: value.clone() for name, value in self.state_dict().items()})
            if len(self.seen) - 1 in self.breaks:
                images = images * float("nan")
        return super().forward(images)


@contextlib.contextmanager
def small_network(make: Callable[[], nn.Module]) -> Iterator[None]:
    """While this lasts runs in this process train another network, and report each step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS._loaded, "resnet18", lambda num_classes: make())
        patch.setattr("cifar_dist.training.callbacks.SECONDS_BETWEEN_STEP_EVENTS", 0)
        yield


@contextlib.contextmanager
def half_on_cpu(scale: float = 2.0**16) -> Iterator[torch.amp.GradScaler]:
    """While this lasts runs in this process train in float16 with a gradient scaler on the CPU,
    which Lightning takes as a plugin only.

    Args:
        scale: the scaler's first.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    make = pl.Trainer

    def trainer(**settings: Any) -> pl.Trainer:
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        plugins = [*settings.pop("plugins"), plugin]
        return make(**{**settings, "precision": None}, plugins=plugins)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl, "Trainer", trainer)
        yield scaler


class SignalAt:
    """A listener that sends this process a signal, as a person would, at a step of an epoch."""

    def __init__(self, epoch: int, step: int, times: int = 1) -> None:
        self.where, self.times, self.heard = (epoch, step), times, []

    def __call__(self, event: Event) -> None:
        self.heard.append(event)
        if isinstance(event, StepDone) and (event.epoch, event.step) == self.where:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def few(data: Path, storage: Path, **settings) -> TrainConfig:
    """The config of a run of seconds in this process."""
    return TrainConfig(
        data_dir=str(data), num_workers=0, batch_size=24, flip=0.0, report=False,
        storage_path=str(storage), name="a", **settings,
    )  # fmt: skip


def same(resumed: Trained, undisturbed: Trained) -> None:
    assert without_timing(resumed.run) == without_timing(undisturbed.run)
    assert resumed.outcome.weights_sha256 == undisturbed.outcome.weights_sha256
    assert resumed.summary["test_loss"] == undisturbed.summary["test_loss"]
