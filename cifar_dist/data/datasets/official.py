"""The official python archives of CIFAR-10 and its like, which torchvision reads and verifies."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_dist.data.datasets import Decoded, LabelledImages, file_digest, sha256_of_files
from cifar_dist.errors import UserError, first_line

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

SIDE = 32
"""Height and width of every image, in pixels."""
DOWNLOAD_TIMEOUT_S = 10


@dataclass(frozen=True)
class Archive:
    """An archive, by its names and its MD5."""

    title: str
    """The data set's name in messages."""
    name: str
    folder: str
    """What is in it."""
    torchvision_class: str
    """The class of torchvision's that reads it, and knows where to download it."""
    md5: str
    """The same as that class has, here so that a damaged archive is refused without torch."""

    def reader(self) -> type[CIFAR10]:
        """Return torchvision's class."""
        from torchvision import datasets

        found: type[CIFAR10] = getattr(datasets, self.torchvision_class)
        return found

    def find(self, folder: Path) -> Official | None:
        """Return the unpacked folder, else the archive, in a folder; None where neither is."""
        there = (folder / name for name in (self.folder, self.name) if (folder / name).exists())
        return next((Official(path, self) for path in there), None)

    def download(self, folder: Path) -> Path:
        """Download the archive into a folder, verified by its MD5, once a folder.

        Returns:
            The archive's path.

        Raises:
            UserError: the folder cannot be written, or the archive cannot be fetched.
        """
        from filelock import FileLock
        from torchvision.datasets.utils import download_url

        reader = self.reader()
        archive: Path = folder / self.name
        lock = folder / f".{self.folder}.lock"
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
                f"no {self.title} in {folder}, and the download failed ({first_line(error)}); put "
                f"{self.name} or Parquet files there, or name their folder with --data-dir"
            ) from None
        return archive


@dataclass(frozen=True)
class Official:
    """An archive or its unpacked folder.

    Nothing is unpickled before its MD5 is what it should be.
    """

    path: Path
    archive: Archive
    reader: type[CIFAR10] | None = None
    """torchvision's data set class, which knows the checksums; None for the real one."""

    def check(self) -> None:
        if self.path.is_dir():
            return  # torchvision verifies each file when it is read
        found = file_digest("md5", self.path)
        if found != self.archive.md5:
            raise UserError(
                f"{self.path}: has MD5 {found}, not {self.archive.md5}; "
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
        reader = self.reader or self.archive.reader()
        try:
            train, test = reader(root, train=True), reader(root, train=False)
        except RuntimeError:  # what torchvision raises for a wrong MD5
            raise UserError(
                f"{self.path}: a file in it is missing or has a wrong MD5; delete it and "
                f"{self.archive.title} is downloaded again"
            ) from None
        return Decoded(_from_torchvision(train), _from_torchvision(test), tuple(train.classes))


def _from_torchvision(dataset: CIFAR10) -> LabelledImages:
    import numpy as np

    # A copy in this order: safetensors writes memory as it lies, so a transposed view would be read
    # back with its pixels in other places.
    images = np.ascontiguousarray(np.asarray(dataset.data).transpose(0, 3, 1, 2))
    return LabelledImages(images, np.asarray(dataset.targets))


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    # torchvision's download sets no timeout of its own, and a silent server would keep it forever.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
