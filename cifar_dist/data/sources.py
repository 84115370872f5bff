"""Where images come from: found, verified, decoded.

This module loads neither torch nor torchvision until something has to be downloaded or unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from cifar_dist.data.order import split
from cifar_dist.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow.parquet as pq
    from torchvision.datasets import CIFAR10

CIFAR10_CLASSES = (
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
DIGITS_TEST_IMAGES = 297
DOWNLOAD_TIMEOUT_S = 10


@dataclass(frozen=True)
class LabelledImages:
    """Images of one split."""

    images: NDArray[np.uint8]
    """``[n, 3, 32, 32]``"""
    labels: NDArray[np.uint8]
    """``[n]`` numbers of classes, from 0."""


@dataclass(frozen=True)
class Decoded:
    """A whole data set in memory."""

    train: LabelledImages
    """The original training images, validation images among them."""
    test: LabelledImages
    classes: tuple[str, ...]


class Source(Protocol):
    """Something a data set can be decoded from."""

    def check(self) -> None:
        """Look for what is quick to see.

        Raises:
            UserError: what is there is damaged or is not this data set.
        """

    def fingerprint(self) -> str:
        """SHA-256 over the bytes that `decode` reads."""

    def decode(self) -> Decoded:
        """All images.

        Raises:
            UserError: what is there is damaged or is not this data set.
        """


# --- digits ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels, each enlarged to a 4x4 block."""

    def check(self) -> None:
        """Nothing to check: the images came with scikit-learn."""

    def fingerprint(self) -> str:
        from importlib.resources import files

        data = files("sklearn.datasets.data") / "digits.csv.gz"
        return hashlib.sha256(data.read_bytes()).hexdigest()

    def decode(self) -> Decoded:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        grey = grey.repeat(4, axis=1).repeat(4, axis=2)
        images = np.ascontiguousarray(np.broadcast_to(grey[:, None], (len(grey), 3, SIDE, SIDE)))
        labels = bunch.target.astype(np.uint8)
        train, test = split(len(images), held_out=DIGITS_TEST_IMAGES)
        return Decoded(
            train=LabelledImages(images[train], labels[train]),
            test=LabelledImages(images[test], labels[test]),
            classes=tuple(str(digit) for digit in range(10)),
        )


# --- Parquet, in the Hugging Face layout -----------------------------------------------------


@dataclass(frozen=True)
class Parquet:
    """Parquet files with encoded images: columns ``img`` or ``image`` (bytes), and ``label``."""

    train: tuple[Path, ...]
    test: tuple[Path, ...]

    def check(self) -> None:
        for file in self.train + self.test:
            with _opened_parquet(file):
                pass

    def fingerprint(self) -> str:
        return _sha256(self.train + self.test)

    def decode(self) -> Decoded:
        train = [_read_parquet(file) for file in self.train]
        test = [_read_parquet(file) for file in self.test]
        return Decoded(
            train=_joined([images for images, _ in train]),
            test=_joined([images for images, _ in test]),
            classes=train[0][1],
        )


@contextmanager
def _opened_parquet(file: Path) -> Iterator[tuple[pq.ParquetFile, str]]:
    """The open file and the name of its column of images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            images = next((name for name in ("img", "image") if name in names), None)
            if images is None or "label" not in names:
                raise UserError(
                    f"{file}: has columns {', '.join(names)}; needs img or image, and label"
                )
            yield parquet, images
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file}: is no readable Parquet file ({first_line(error)}); fetch it again"
        ) from None


def _read_parquet(file: Path) -> tuple[LabelledImages, tuple[str, ...]]:
    import pyarrow as pa

    with _opened_parquet(file) as (parquet, image_column):
        table = parquet.read(columns=[image_column, "label"])
    classes = _class_names(table.schema.metadata or {})
    column = table[image_column].combine_chunks()
    encoded = (column.field("bytes") if pa.types.is_struct(column.type) else column).to_pylist()
    labels = table["label"].to_numpy()
    if not len(labels):
        raise UserError(f"{file}: holds no images; fetch it again")
    if not np.isin(labels, np.arange(len(classes))).all():
        raise UserError(f"{file}: has labels outside 0 to {len(classes) - 1}; is it CIFAR-10?")
    images = np.empty((len(encoded), 3, SIDE, SIDE), np.uint8)

    def decode(row: int) -> None:
        try:
            images[row] = _decoded_image(encoded[row])
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{file}: row {row} is no {SIDE}x{SIDE} image ({first_line(error)}); fetch it again"
            ) from None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode, range(len(encoded)), chunksize=1000))
    return LabelledImages(images, labels.astype(np.uint8)), classes


def _decoded_image(encoded: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        if image.size != (SIDE, SIDE):
            raise ValueError(f"it has {image.width}x{image.height} pixels")
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _class_names(schema_metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    """The class names that the ``datasets`` library writes into the schema, else CIFAR-10's."""
    try:
        features = json.loads(schema_metadata[b"huggingface"])["info"]["features"]
        return tuple(features["label"]["names"])
    except (KeyError, ValueError, TypeError):
        return CIFAR10_CLASSES


# --- the official archive --------------------------------------------------------------------


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
        found = _digest("md5", self.path)
        if found != self.archive_md5:
            raise UserError(
                f"{self.path}: has MD5 {found}, not {self.archive_md5}; "
                "delete it and it is downloaded again"
            )

    def fingerprint(self) -> str:
        files = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        return _sha256(tuple(file for file in files if file.is_file()))

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
        except RuntimeError:  # torchvision's word for a wrong MD5
            raise UserError(
                f"{self.path}: a file in it is missing or has a wrong MD5; delete it and "
                "CIFAR-10 is downloaded again"
            ) from None
        return Decoded(_from_torchvision(train), _from_torchvision(test), tuple(train.classes))


def _from_torchvision(dataset: CIFAR10) -> LabelledImages:
    images = np.ascontiguousarray(np.asarray(dataset.data).transpose(0, 3, 1, 2))
    return LabelledImages(images, np.asarray(dataset.targets, np.uint8))


def download(folder: Path) -> Path:
    """Download the official archive into a folder, verified by its MD5, once a folder.

    Returns:
        The archive's path.

    Raises:
        UserError: the folder cannot be written, or the archive cannot be fetched.
    """
    from torchvision.datasets.utils import download_url

    reader = _torchvision_cifar10()
    archive: Path = folder / reader.filename
    lock = folder / ".cifar10.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if not archive.exists():  # else another process fetched it while this one waited
                with (
                    tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as aside,
                    _timeout(DOWNLOAD_TIMEOUT_S),
                ):
                    download_url(reader.url, aside, archive.name, reader.tgz_md5)
                    os.replace(Path(aside) / archive.name, archive)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        with suppress(OSError):  # leave no folder behind that holds nothing
            lock.unlink()
            folder.rmdir()
        raise UserError(
            f"no CIFAR-10 in {folder}, and the download failed ({first_line(error)}); put "
            "cifar-10-python.tar.gz or Parquet files there, or name their folder with --data-dir"
        ) from None
    return archive


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# --- finding ---------------------------------------------------------------------------------


def find_source(dataset: str, data_dir: str | Path) -> Source:
    """What the data set can be decoded from, checked as far as that is quick.

    The official archive is downloaded if nothing is there.

    Raises:
        UserError: there is nothing and the download fails, or what is there is damaged.
    """
    try:
        source = Digits() if dataset == "digits" else _find_cifar10(Path(data_dir))
        source.check()
    except OSError as error:
        raise UserError(f"{data_dir}: cannot be read ({error.strerror or error})") from None
    return source


def has_cifar10(folder: Path) -> bool:
    """Whether there is anything in a folder that `find_source` would not download anew."""
    names = [*_OFFICIAL, "train*.parquet", "*/train*.parquet", "test*.parquet", "*/test*.parquet"]
    return any(True for name in names for _ in folder.glob(name))


_OFFICIAL = ("cifar-10-batches-py", "cifar-10-python.tar.gz")


def _find_cifar10(folder: Path) -> Source:
    for name in _OFFICIAL:
        if (folder / name).exists():
            return Official(folder / name)
    train, test = (
        tuple(sorted([*folder.glob(f"{name}*.parquet"), *folder.glob(f"*/{name}*.parquet")]))
        for name in ("train", "test")
    )
    if train and test:
        return Parquet(train, test)
    if train or test:
        there, missing = ("train", "test") if train else ("test", "train")
        raise UserError(
            f"{folder}: has {there}*.parquet but no {missing}*.parquet; both splits are needed"
        )
    return Official(download(folder))


def _joined(parts: list[LabelledImages]) -> LabelledImages:
    return LabelledImages(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )


def _sha256(files: tuple[Path, ...]) -> str:
    """Over the files' contents, in order; names do not count, so a renamed folder is the same."""
    digests = "".join(_digest("sha256", file) for file in files)
    return hashlib.sha256(digests.encode()).hexdigest()


def _digest(algorithm: str, file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, algorithm).hexdigest()


def _torchvision_cifar10() -> type[CIFAR10]:
    from torchvision import datasets

    reader: type[CIFAR10] = datasets.CIFAR10
    return reader
