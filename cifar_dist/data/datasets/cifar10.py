"""CIFAR-10: the official archive, its unpacked folder, or Parquet files; downloaded if missing."""

from __future__ import annotations

from pathlib import Path

from cifar_dist.data.datasets import Source
from cifar_dist.data.datasets.official import SIDE, Archive
from cifar_dist.registry import DatasetTraits, with_traits

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
ARCHIVE = Archive(
    "CIFAR-10",
    "cifar-10-python.tar.gz",
    "cifar-10-batches-py",
    "CIFAR10",
    md5="c58f30108f718f92721af3b95e74349a",
)


@with_traits(DatasetTraits(title="CIFAR-10", download=ARCHIVE.download))
def find_cifar10(folder: Path) -> Source | None:
    """Return what there is of CIFAR-10 in a folder: the official archive first, else Parquet."""
    if (official := ARCHIVE.find(folder)) is not None:
        return official
    from cifar_dist.data.datasets.parquet import find_parquet

    return find_parquet(folder, CLASSES, SIDE)
