"""A run's metrics: the columns of its table, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cifar_dist.registry import COLUMNS

METRICS = tuple(COLUMNS)
"""Columns of ``metrics.csv``. ``epoch`` is 1-based; ``step`` and ``samples`` (training images)
count from the run's start; ``lr`` is that of the epoch's last step; losses and accuracies are
means over all workers' images; ``images_per_second`` is of training, ``seconds`` of the epoch
with its validation."""

WHOLE_METRICS = frozenset(name for name in COLUMNS if COLUMNS.about(name).whole)
"""The columns of whole numbers."""

TIMING_METRICS = tuple(name for name in COLUMNS if COLUMNS.about(name).timing)
"""The columns that differ between two runs of the same settings."""


@dataclass(frozen=True)
class Outcome:
    """What came of a training run that reached its last epoch."""

    history: list[dict[str, Any]]
    """A row of `METRICS` an epoch."""
    best_epoch: int
    """1-based: the epoch of the highest validation accuracy, the first of equals."""
    test_accuracy: float | None
    """Of the best epoch's weights; None where the test images were left alone."""
    test_loss: float | None
    test_images: int
    """Images that the two figures are means of."""
    skipped_updates: int
    """Steps that were undone because their loss, or a gradient in float16, was not finite."""
    weights_sha256: str
    """SHA-256 of the last epoch's weights as the bytes of a safetensors file."""
