"""Images to measure with: real CIFAR-10 where ``CIFAR_DIST_DATA`` names it, else noise.

How fast a loader or a step is does not depend on what the images show.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def source() -> str:
    """Return what the images are, formatted for display."""
    return "CIFAR-10" if os.environ.get("CIFAR_DIST_DATA") else "noise"


def write_folder(folder: Path, train: int, test: int) -> None:
    """Write Parquet files with so many images in the Hugging Face layout, which `train` reads."""
    from tests.conftest import first_images

    given = os.environ.get("CIFAR_DIST_DATA")
    if given and any(Path(given).glob("train*.parquet")):
        folder.mkdir(parents=True, exist_ok=True)
        first_images(Path(given), folder, train, test)
        return
    for seed, (split, count) in enumerate((("train", train), ("test", test))):
        _write_noise(folder / f"{split}-00000-of-00001.parquet", count, seed)


def _write_noise(file: Path, count: int, seed: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.conftest import encoded

    # All differ: images that are trained on and validated on are refused. As BMP, which is encoded
    # in an eighth of PNG's time.
    noise = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)
    cells = [{"bytes": encoded(image, "BMP"), "path": None} for image in noise]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"img": cells, "label": np.arange(count) % 10}), file)


@functools.cache  # decoding takes longer than a GPU's epoch
def arrays(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the folder's training images ``[n, 32, 32, 3]`` and labels, as torchvision's CIFAR10
    has them in memory; do not change them."""
    from cifar_dist.data.datasets import find_source

    train = find_source("cifar10", str(folder)).decode().train
    images = np.ascontiguousarray(train.images.transpose(0, 2, 3, 1))
    return images, train.labels.astype(np.int64)
