"""CIFAR-100 by its 100 fine labels: the official archive or Parquet; downloaded if missing."""

from __future__ import annotations

from pathlib import Path

from cifar_dist.data.datasets import Source
from cifar_dist.data.datasets.official import SIDE, Archive
from cifar_dist.registry import DatasetTraits, with_traits

ARCHIVE = Archive(
    "CIFAR-100",
    "cifar-100-python.tar.gz",
    "cifar-100-python",
    "CIFAR100",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
)


@with_traits(DatasetTraits(title="CIFAR-100", download=ARCHIVE.download))
def find_cifar100(folder: Path) -> Source | None:
    """Return what there is of CIFAR-100 in a folder: the official archive first, else Parquet."""
    if (official := ARCHIVE.find(folder)) is not None:
        return official
    from cifar_dist.data.datasets.parquet import find_parquet

    return find_parquet(folder, side=SIDE, label="fine_label")
