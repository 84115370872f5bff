"""The official python archives of CIFAR-10 and its like, packed or unpacked.

They are read by hand, in few lines: torchvision's reader would unpack the archive to a disk first,
into a temporary folder that may be too small.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.data.datasets import Decoded, LabelledImages, contents, file_digest
from cifar_dist.errors import UserError, first_line

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

SIDE = 32
"""Height and width of every image, in pixels."""
DOWNLOAD_TIMEOUT_S = 10
_PACKED = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Archive:
    """An archive, by its names and its checksums."""

    title: str
    """The data set's name in messages."""
    name: str
    folder: str
    """What is in it."""
    torchvision_class: str
    """The class of torchvision's that knows where to download it."""
    md5: str
    """The same as that class has, here so that a damaged archive is refused without torch."""
    sha256: str
    """Of the archive, and in this way of what is in it, unpacked or not."""
    train: Mapping[str, str]
    """MD5, as that class has it, by name of each file with training images, in their order."""
    test: Mapping[str, str]
    """The same with test images."""
    meta: Mapping[str, str]
    """The same of the file with the classes' names."""
    other: tuple[str, ...]
    """Files in the archive that hold no data."""
    label_key: str
    """Of the labels in a file with images."""
    names_key: str
    """Of the classes' names in their file."""

    @property
    def files(self) -> dict[str, str]:
        """MD5 of each file with data, by name."""
        return {**self.train, **self.test, **self.meta}

    def reader(self) -> type[CIFAR10]:
        """Return torchvision's class."""
        from torchvision import datasets

        found: type[CIFAR10] = getattr(datasets, self.torchvision_class)
        return found

    def find(self, folder: Path) -> Official | None:
        """Return the unpacked folder, else the archive, in a folder; None where neither is.

        The folder may also be the unpacked one itself, or the archive.
        """
        if folder.is_file():
            return Official(folder, self) if folder.name.endswith(_PACKED) else None
        # Under its own name, else as a browser names what it unzips or a second copy.
        others = sorted(folder.glob(f"{self.name.partition('.')[0]}*"))
        there = [folder / self.name, *(file for file in others if file.name.endswith(_PACKED))]
        packed = next((file for file in there if file.is_file()), None)
        unpacked = folder / self.folder
        # Half an unpacked folder is of no use where the archive lies beside it.
        whole = self._files_in(unpacked) == len(self.files)
        if unpacked.is_dir() and (whole or packed is None):
            return Official(unpacked, self)
        if packed is not None:
            return Official(packed, self)
        return Official(folder, self) if self._files_in(folder) else None

    def _files_in(self, folder: Path) -> int:
        return sum((folder / name).is_file() for name in self.files)

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
        there = contents(folder)
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
                f"{self.name} or Parquet files there, or name their folder with --data-dir "
                f"({there})"
            ) from None
        return archive


@dataclass(frozen=True)
class Official:
    """An archive or its unpacked folder.

    Nothing is unpickled before its MD5 is what it should be.
    """

    path: Path
    archive: Archive

    def check(self) -> None:
        if self.path.is_dir():
            for name, md5 in self.archive.files.items():
                self._check_md5(self.path / name, md5)
            return
        try:
            self._check_md5(self.path, self.archive.md5)
        except UserError:
            if not self._is_packed_anew():
                raise

    def _is_packed_anew(self) -> bool:
        """Return whether an archive has other bytes, but the same files in it."""
        try:
            inside = {name: hashlib.md5(content).hexdigest() for name, content in self._unpacked()}
        except (OSError, EOFError, tarfile.TarError, zlib.error):
            return False
        return self.archive.files.items() <= inside.items()

    def _check_md5(self, file: Path, expected: str) -> None:
        again = f"delete {self.path} and it is downloaded again"
        try:
            found = file_digest("md5", file)
        except OSError as error:
            raise UserError(
                f"{file}: cannot be read ({error.strerror or error}); make it readable, or {again}"
            ) from None
        if found != expected:
            raise UserError(f"{file}: has MD5 {found}, not {expected}; {again}")

    def image_side(self) -> int:
        return SIDE

    def fingerprint(self) -> str:
        # The same for the archive and for its unpacked folder, whatever else is in that, since
        # `check` has found the checksums right: nodes may have one or the other. It is what
        # versions up to 0.2.0 computed from the archive.
        return hashlib.sha256(self.archive.sha256.encode()).hexdigest()

    def earlier_fingerprints(self) -> Iterator[str]:
        """Yield what versions up to 0.2.0 computed of the unpacked folder: of all files in it."""
        if self.path.is_dir():
            files = [file for file in self.path.iterdir() if file.is_file()]
            found = {file.name: file_digest("sha256", file) for file in files}
        else:
            found = {
                name: hashlib.sha256(content).hexdigest() for name, content in self._unpacked()
            }
        of_archive = {*self.archive.files, *self.archive.other}
        for names in (of_archive & found.keys(), found.keys()):
            digests = "".join(found[name] for name in sorted(names))
            yield hashlib.sha256(digests.encode()).hexdigest()

    def decode(self) -> Decoded:
        import numpy as np

        found = {name: content for name, content in self._unpacked() if name in self.archive.files}

        def unpickled(name: str) -> dict[str, Any]:
            content, expected = found.pop(name, b""), self.archive.files[name]
            # Of what is unpickled, not of the file as `check` saw it.
            if (md5 := hashlib.md5(content).hexdigest()) != expected:
                raise UserError(
                    f"{self.path}: {name} in it has a wrong MD5, {md5} and not {expected}; delete "
                    f"it and {self.archive.title} is downloaded again"
                )
            values: dict[str, Any] = pickle.loads(content, encoding="latin1")
            return values

        def images(names: Mapping[str, str]) -> LabelledImages:
            batches = [unpickled(name) for name in names]
            pixels = np.concatenate([batch["data"] for batch in batches])
            labels = [label for batch in batches for label in batch[self.archive.label_key]]
            return LabelledImages(pixels.reshape(-1, 3, SIDE, SIDE), np.asarray(labels))

        (meta,) = self.archive.meta
        names = tuple(unpickled(meta)[self.archive.names_key])
        return Decoded(images(self.archive.train), images(self.archive.test), names)

    def _unpacked(self) -> Iterator[tuple[str, bytes]]:
        """Yield name and content of each file in the archive, or in its unpacked folder."""
        if self.path.is_dir():
            for file in self.path.iterdir():
                if file.name in self.archive.files:
                    yield file.name, file.read_bytes()
            return
        with tarfile.open(self.path) as archive:
            for member in archive:
                if (content := archive.extractfile(member)) is not None:
                    yield Path(member.name).name, content.read()


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    # torchvision's download sets no timeout of its own, and a silent server would keep it forever.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
