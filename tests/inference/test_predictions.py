"""Answers of a classifier, kept with every class."""

import numpy as np

from cifar_dist.inference.predictions import Predictions


def test_300_classes_come_back_whole() -> None:
    labels = np.arange(300, dtype=np.int16)
    logits = np.zeros((300, 300), np.float32)
    logits[labels, labels] = 1
    logits[299, 43] = 2  # what label 299 is in eight bits
    images = np.zeros((300, 1, 8, 8), np.uint8)
    classes = tuple(map(str, range(300)))
    kept = Predictions.of("test", 1, classes, logits, labels, images, np.arange(300))
    found = Predictions.from_bytes(kept.to_bytes())
    assert found.labels.dtype == np.int16
    assert found.labels.tolist() == list(range(300))
    assert (found.classes, found.mistakes.tolist()) == (classes, [299])
    assert found.pictures.shape == (1, 1, 8, 8)
