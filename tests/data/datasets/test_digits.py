"""scikit-learn's digits, enlarged."""

from pathlib import Path

import numpy as np

from cifar_dist.data.datasets import find_source


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    decoded = find_source("digits", tmp_path).decode()
    assert (len(decoded.train.images), len(decoded.test.images)) == (1_500, 297)
    small = np.concatenate([decoded.train.images, decoded.test.images])[:, :, ::4, ::4]
    assert np.array_equal(small[:, 0], small[:, 2])
    ours = sorted(image.tobytes() for image in np.rint(small[:, 0] / 255 * 16).astype(np.uint8))
    theirs = sorted(image.tobytes() for image in load_digits().images.astype(np.uint8))
    assert ours == theirs
