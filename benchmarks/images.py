"""Images to measure with: real CIFAR-10 where ``CIFAR_DIST_DATA`` names it, else noise.

How fast a loader or a step is does not depend on what the images show.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def source() -> str:
    """What the images are, in words."""
    return "CIFAR-10" if os.environ.get("CIFAR_DIST_DATA") else "noise"


def write_folder(folder: Path, train: int, test: int) -> None:
    """Parquet files with so many images in the Hugging Face layout, which `train` reads."""
    from tests.conftest import first_images, write_parquet

    if given := os.environ.get("CIFAR_DIST_DATA"):
        first_images(Path(given), folder, train, test)
        return
    for split, count in (("train", train), ("test", test)):
        file = folder / f"{split}-00000-of-00001.parquet"
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
        write_parquet(file, images, np.arange(count) % 10)


def arrays(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The folder's training images ``[n, 32, 32, 3]`` and labels, as torchvision's CIFAR10 has
    them in memory."""
    from cifar_dist.data.sources import find_source

    train = find_source("cifar10", str(folder)).decode().train
    images = np.ascontiguousarray(train.images.transpose(0, 2, 3, 1))
    return images, train.labels.astype(np.int64)
