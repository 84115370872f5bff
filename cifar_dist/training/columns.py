"""The columns of ``metrics.csv``, by the names that `cifar_dist.registry` gives them.

A column is a function of an epoch's end that returns a number. It is called on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl


@dataclass(frozen=True)
class EpochEnd:
    """Facts that are known at an epoch's end."""

    trainer: pl.Trainer
    """With the module, as training and validation have left it."""
    train: Mapping[str, float]
    """``loss``, ``accuracy`` and number of ``images`` of training, over all ranks."""
    val: Mapping[str, float]
    """The same of validation."""
    before: Mapping[str, Any]
    """The row of the epoch before this one; empty for the first."""
    lr: float
    """Learning rate of the epoch's last step."""
    training_seconds: float
    """Wall time of the epoch's training steps, in this run of the process."""
    seconds: float
    """The same with validation."""


def epoch(end: EpochEnd) -> int:
    """Return the epoch's number, 1-based."""
    return end.trainer.current_epoch + 1


def step(end: EpochEnd) -> int:
    """Return the optimizer steps since the run's start."""
    return end.trainer.global_step


def samples(end: EpochEnd) -> int:
    """Return the training images since the run's start."""
    # Added up from what was counted: a step that `SkipNonFinite` undoes counts no images, so epochs
    # times images would be too many.
    return int(end.before.get("samples", 0) + end.train["images"])


def world_size(end: EpochEnd) -> int:
    """Return the number of workers."""
    return end.trainer.world_size


def lr(end: EpochEnd) -> float:
    """Return the learning rate of the epoch's last step."""
    return end.lr


def train_loss(end: EpochEnd) -> float:
    """Return the mean loss over the training images."""
    return end.train["loss"]


def train_accuracy(end: EpochEnd) -> float:
    """Return the accuracy over the training images."""
    return end.train["accuracy"]


def val_loss(end: EpochEnd) -> float:
    """Return the mean loss over the validation images."""
    return end.val["loss"]


def val_accuracy(end: EpochEnd) -> float:
    """Return the accuracy over the validation images."""
    return end.val["accuracy"]


def images_per_second(end: EpochEnd) -> float:
    """Return the training images a second, over all workers."""
    return end.train["images"] / end.training_seconds


def seconds(end: EpochEnd) -> float:
    """Return the wall time of the epoch with its validation."""
    return end.seconds
