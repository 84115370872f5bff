"""scikit-learn's handwritten digits: no folder, no download, seconds to train on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cifar_dist.data.datasets import Decoded, LabelledImages
from cifar_dist.registry import DatasetTraits, with_traits

TEST_IMAGES = 297
ENLARGED = 4
"""Each pixel becomes a block of so many by so many, and images of 8x8 pixels of 32x32."""


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels, each enlarged to a 4x4 block."""

    def check(self) -> None:
        """Check nothing: the images came with scikit-learn."""

    def image_side(self) -> int:
        return 8 * ENLARGED

    def fingerprint(self) -> str:
        from importlib.resources import files

        data = files("sklearn.datasets.data") / "digits.csv.gz"
        return hashlib.sha256(data.read_bytes()).hexdigest()

    def decode(self) -> Decoded:
        import numpy as np
        from sklearn.datasets import load_digits

        from cifar_dist.data.order import split

        bunch = load_digits()
        grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        grey = grey.repeat(ENLARGED, axis=1).repeat(ENLARGED, axis=2)
        # Three equal channels, since the registry's networks take ``[B, 3, H, W]``.
        images = np.ascontiguousarray(
            np.broadcast_to(grey[:, None], (len(grey), 3, *grey[0].shape))
        )
        # scikit-learn's digits have no split. This one does not depend on the run's seed, so that
        # all runs are tested on the same images.
        train, test = split(len(images), held_out=TEST_IMAGES)
        return Decoded(
            train=LabelledImages(images[train], bunch.target[train]),
            test=LabelledImages(images[test], bunch.target[test]),
            classes=tuple(map(str, bunch.target_names)),
        )


@with_traits(DatasetTraits(mirrored_alike=False, needs_folder=False))
def find_digits(folder: Path) -> Digits:
    """Return the digits, whatever the folder; a mirrored 3 is no digit."""
    return Digits()
