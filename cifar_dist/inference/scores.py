"""Metrics of a classifier, from logits and labels.

At import this loads no torch, which a report does not need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

CALIBRATION_BINS = 15
MATRIX_CLASSES = 40
"""Most classes whose confusion matrix is printed or drawn: a wider one cannot be read, and takes
minutes to draw."""


@dataclass(frozen=True)
class Scores:
    """Metrics over one set of images."""

    images: int
    accuracy: float
    loss: float
    """Mean cross-entropy, in nats."""
    ece: float
    """Expected calibration error: mean distance of confidence and accuracy, over 15 equal bins of
    confidence (Guo et al., "On calibration of modern neural networks", 2017)."""
    per_class: pd.DataFrame
    """A row a class: ``class``, ``images``, ``precision``, ``recall``, ``f1``."""
    confusion: NDArray[np.int64]
    """``[classes, classes]`` images, by label (rows) and prediction (columns)."""

    def to_dict(self) -> dict[str, Any]:
        """Return all metrics as plain values."""
        return {
            "images": self.images,
            "accuracy": self.accuracy,
            "loss": self.loss,
            "ece": self.ece,
            "per_class": self.per_class.to_dict("records"),
            "confusion": self.confusion.tolist(),
        }


def score(logits: NDArray[np.float32], labels: NDArray[Any], classes: tuple[str, ...]) -> Scores:
    """Compute the metrics of ``[n, classes]`` logits for ``[n]`` labels; sums are in float64."""
    import torch
    import torch.nn.functional as F
    from torchmetrics.functional.classification import multiclass_calibration_error

    values = torch.from_numpy(logits).double()
    truth = torch.from_numpy(labels.astype(np.int64))
    predicted = logits.argmax(axis=1)
    return Scores(
        images=len(labels),
        accuracy=int((predicted == labels).sum()) / len(labels),
        loss=float(F.cross_entropy(values, truth)),
        ece=float(
            multiclass_calibration_error(
                values.softmax(dim=1), truth, len(classes), n_bins=CALIBRATION_BINS
            )
        ),
        per_class=per_class(labels, predicted, classes),
        confusion=confusion(labels, predicted, len(classes)),
    )


def per_class(
    labels: NDArray[Any], predicted: NDArray[Any], classes: tuple[str, ...]
) -> pd.DataFrame:
    """Compute `Scores.per_class` of ``[n]`` labels and predictions, without torch."""
    from sklearn.metrics import precision_recall_fscore_support

    # All classes by number: scikit-learn would omit those that do not occur, and the rows would no
    # longer match the names. zero_division keeps it from warning of classes never predicted.
    precision, recall, f1, images = precision_recall_fscore_support(
        labels, predicted, labels=np.arange(len(classes)), zero_division=0.0
    )
    return pd.DataFrame(
        {
            "class": list(classes),
            "images": images,
            "precision": precision,
            "recall": recall,
            "f1": f1,
        }
    )


def confusion(labels: NDArray[Any], predicted: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """Compute `Scores.confusion` of ``[n]`` labels and predictions, without torch."""
    from sklearn.metrics import confusion_matrix

    counts: NDArray[np.int64] = confusion_matrix(labels, predicted, labels=np.arange(classes))
    return counts
