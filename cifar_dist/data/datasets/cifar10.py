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
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    meta={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
    other=("readme.html",),
    label_key="labels",
    names_key="label_names",
)


@with_traits(DatasetTraits(title="CIFAR-10", download=ARCHIVE.download))
def find_cifar10(folder: Path) -> Source | None:
    """Return what there is of CIFAR-10 in a folder: the official archive first, else Parquet."""
    if (official := ARCHIVE.find(folder)) is not None:
        return official
    from cifar_dist.data.datasets.parquet import find_parquet

    return find_parquet(folder, CLASSES, SIDE)
