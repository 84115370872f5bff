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
    sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    meta={"meta": "7973b15100ade9c7d40fb424638fde48"},
    other=("file.txt~",),
    label_key="fine_labels",
    names_key="fine_label_names",
)


@with_traits(DatasetTraits(title="CIFAR-100", download=ARCHIVE.download))
def find_cifar100(folder: Path) -> Source | None:
    """Return what there is of CIFAR-100 in a folder: the official archive first, else Parquet."""
    if (official := ARCHIVE.find(folder)) is not None:
        return official
    from cifar_dist.data.datasets.parquet import find_parquet

    return find_parquet(folder, side=SIDE, label="fine_label")
