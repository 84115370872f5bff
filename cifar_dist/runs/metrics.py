"""A run's metrics: the columns of its table, and its outcome."""

from __future__ import annotations

import csv
import io
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
    """The outcome of a training run that reached its last epoch."""

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


def read_rows(text: str) -> list[dict[str, Any]]:
    """Read the rows of a ``metrics.csv``, also one that another version wrote.

    Returns:
        A dict of all `COLUMNS` a row. A column that the file does not have, or a value that it
        leaves empty, is None; a column that only another version has is ignored. Rows from the
        first one on that is cut or damaged are omitted.
    """
    rows: list[dict[str, Any]] = []
    # Without a line that has no end: of a number that is cut the rest is a number, too.
    for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])):
        try:
            if None in row or None in row.values():
                break
            values = {name: _value(name, row.get(name)) for name in COLUMNS}
        except ValueError:
            break
        if values["epoch"] != len(rows) + 1:
            break
        rows.append(values)
    return rows


def _value(name: str, text: str | None) -> float | None:
    # Empty in a file, e.g. for a column that came later.
    if not text:
        return None
    return int(text) if COLUMNS.about(name).whole else float(text)
