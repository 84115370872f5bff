"""Runs of seconds: a small network on a few real digits, in this process."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import pytest
from torch import nn

from cifar_dist.train import Trained
from tests.training.test_fit import without_timing

TrainFew = Callable[..., Trained]

STEPS = 6
"""Of an epoch: 144 images, 24 a step."""


@contextlib.contextmanager
def small_network(make: Callable[[], nn.Module]) -> Iterator[None]:
    """While this lasts runs in this process train another network, and tell of each step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cifar_dist.training.fit.resnet18", lambda *args: make())
        patch.setattr("cifar_dist.training.callbacks.SECONDS_BETWEEN_STEP_EVENTS", 0)
        yield


class SignalAt:
    """A listener that sends this process a signal, as a person would, at a step of an epoch."""

    def __init__(self, epoch: int, step: int, times: int = 1) -> None:
        self.where, self.times, self.heard = (epoch, step), times, []

    def __call__(self, event: dict) -> None:
        self.heard.append(event)
        if event["kind"] == "step" and (event["epoch"], event["step"]) == self.where:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def same(resumed: Trained, undisturbed: Trained) -> None:
    assert without_timing(resumed.run) == without_timing(undisturbed.run)
    assert resumed.outcome.weights_sha256 == undisturbed.outcome.weights_sha256
    assert resumed.summary["test_loss"] == undisturbed.summary["test_loss"]
