"""CIFAR-10: the official archive, its unpacked folder, or Parquet files; downloaded if missing."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_dist.data.datasets import (
    Decoded,
    LabelledImages,
    Source,
    file_digest,
    sha256_of_files,
)
from cifar_dist.errors import UserError, first_line
from cifar_dist.registry import DatasetTraits, with_traits

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

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
SIDE = 32
"""Height and width of every image, in pixels."""
DOWNLOAD_TIMEOUT_S = 10
_OFFICIAL = ("cifar-10-batches-py", "cifar-10-python.tar.gz")


@dataclass(frozen=True)
class Official:
    """The official python archive or its unpacked folder; read and verified by torchvision.

    Nothing is unpickled before its MD5 is what it should be.
    """

    path: Path
    """``cifar-10-python.tar.gz`` or ``cifar-10-batches-py``."""
    reader: type[CIFAR10] | None = None
    """torchvision's data set class, which knows the checksums; None for the real one."""
    archive_md5: str = "c58f30108f718f92721af3b95e74349a"
    """The same as ``CIFAR10.tgz_md5``, here so that a damaged archive is refused quickly."""

    def check(self) -> None:
        if self.path.is_dir():
            return  # torchvision verifies each file when it is read
        found = file_digest("md5", self.path)
        if found != self.archive_md5:
            raise UserError(
                f"{self.path}: has MD5 {found}, not {self.archive_md5}; "
                "delete it and it is downloaded again"
            )

    def image_side(self) -> int:
        return SIDE

    def fingerprint(self) -> str:
        files = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        return sha256_of_files(file for file in files if file.is_file())

    def decode(self) -> Decoded:
        if self.path.is_dir():
            return self._decode_folder(self.path.parent)
        from torchvision.datasets.utils import extract_archive

        self.check()
        with tempfile.TemporaryDirectory() as folder:
            extract_archive(str(self.path), folder)
            return self._decode_folder(Path(folder))

    def _decode_folder(self, root: Path) -> Decoded:
        reader = self.reader or _torchvision_cifar10()
        try:
            train, test = reader(root, train=True), reader(root, train=False)
        except RuntimeError:  # what torchvision raises for a wrong MD5
            raise UserError(
                f"{self.path}: a file in it is missing or has a wrong MD5; delete it and "
                "CIFAR-10 is downloaded again"
            ) from None
        return Decoded(_from_torchvision(train), _from_torchvision(test), tuple(train.classes))


def _from_torchvision(dataset: CIFAR10) -> LabelledImages:
    import numpy as np

    # A copy in this order: safetensors writes memory as it lies, so a transposed view would be read
    # back with its pixels in other places.
    images = np.ascontiguousarray(np.asarray(dataset.data).transpose(0, 3, 1, 2))
    return LabelledImages(images, np.asarray(dataset.targets))


def download(folder: Path) -> Path:
    """Download the official archive into a folder, verified by its MD5, once a folder.

    Returns:
        The archive's path.

    Raises:
        UserError: the folder cannot be written, or the archive cannot be fetched.
    """
    from filelock import FileLock
    from torchvision.datasets.utils import download_url

    reader = _torchvision_cifar10()
    archive: Path = folder / reader.filename
    lock = folder / ".cifar10.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if not archive.exists():  # else another process fetched it while this one waited
                with (
                    # In the same folder, since a rename is atomic within a file system only: a
                    # download that is cut leaves no archive under the final name.
                    tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as aside,
                    _timeout(DOWNLOAD_TIMEOUT_S),
                ):
                    download_url(reader.url, aside, archive.name, reader.tgz_md5)
                    os.replace(Path(aside) / archive.name, archive)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        with suppress(OSError):  # a folder made for nothing would look like a data folder
            lock.unlink()
            folder.rmdir()
        raise UserError(
            f"no CIFAR-10 in {folder}, and the download failed ({first_line(error)}); put "
            "cifar-10-python.tar.gz or Parquet files there, or name their folder with --data-dir"
        ) from None
    return archive


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    # torchvision's download sets no timeout of its own, and a silent server would keep it forever.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _torchvision_cifar10() -> type[CIFAR10]:
    from torchvision import datasets

    reader: type[CIFAR10] = datasets.CIFAR10
    return reader


@with_traits(DatasetTraits(title="CIFAR-10", download=download))
def find_cifar10(folder: Path) -> Source | None:
    """Return what there is of CIFAR-10 in a folder: the official archive first, else Parquet."""
    for name in _OFFICIAL:
        if (folder / name).exists():
            return Official(folder / name)
    from cifar_dist.data.datasets.parquet import find_parquet

    return find_parquet(folder, CLASSES, SIDE)
