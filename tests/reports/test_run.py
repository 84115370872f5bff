"""Parts of a run's page that other runs' pages do not have."""

import numpy as np

from cifar_dist.inference.predictions import Predictions
from cifar_dist.reports.run import _confusion, _mistakes


def predictions(count: int) -> Predictions:
    """One grey image of each class, all predicted correctly but for the last."""
    labels = np.arange(count, dtype=np.int16)
    logits = np.eye(count, dtype=np.float32)
    logits[-1, 0] = 2
    images = np.zeros((count, 1, 8, 8), np.uint8)
    return Predictions.of(
        "test", 1, tuple(map(str, labels)), logits, labels, images, np.arange(count)
    )


def test_a_confusion_matrix_of_300_classes_is_not_drawn() -> None:
    assert [drawing.name for drawing in _confusion(predictions(12)).drawings] == ["confusion"]
    section = _confusion(predictions(300))
    assert not section.drawings
    assert len(section.tables[0].rows) == 300


def test_a_mistake_of_300_classes_is_shown_with_its_label() -> None:
    (picture,) = _mistakes(predictions(300)).pictures
    assert (picture.label, picture.predicted) == ("299", "0")
