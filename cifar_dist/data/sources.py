"""Where images come from: found, verified, decoded once a node, then mapped by every process.

The decoded data set is one safetensors file of bytes. All workers of a node map it, so it is in
memory once. Its name holds a fingerprint of what it was made from: other data, another file.

This module loads neither torch nor torchvision until something has to be downloaded or unpickled.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from cifar_dist.data.order import batch_bounds, split
from cifar_dist.data.statistics import ChannelStatistics
from cifar_dist.errors import UserError

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
HELD_OUT_SHARE = 10
"""One in this many training images is held out for validation."""
DOWNLOAD_TIMEOUT_S = 10
_FORMAT = "1"
"""Part of a cached file's name: raise it when what is written changes."""


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
            f"{file}: is no readable Parquet file ({_first_line(error)}); fetch it again"
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
                f"{file}: row {row} is no {SIDE}x{SIDE} image ({_first_line(error)}); fetch it again"
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
    reader: Callable[[], type[CIFAR10]] = lambda: _torchvision().datasets.CIFAR10
    """torchvision's data set class, which knows the checksums."""
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
        self.check()
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            _torchvision().datasets.utils.extract_archive(str(self.path), folder)
            return self._decode_folder(Path(folder))

    def _decode_folder(self, root: Path) -> Decoded:
        reader = self.reader()
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
    reader = _torchvision().datasets.CIFAR10
    archive = folder / reader.filename
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".cifar10.lock"):
            if not archive.exists():  # else another process fetched it while this one waited
                with (
                    tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as aside,
                    _timeout(DOWNLOAD_TIMEOUT_S),
                ):
                    _torchvision().datasets.utils.download_url(
                        reader.url, aside, archive.name, reader.tgz_md5
                    )
                    os.replace(Path(aside) / archive.name, archive)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise UserError(
            f"no CIFAR-10 in {folder}, and it cannot be downloaded there ({_first_line(error)}); put "
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


# --- finding and caching ---------------------------------------------------------------------


def find_source(dataset: str, data_dir: str | Path) -> Source:
    """What the data set can be decoded from, checked as far as that is quick.

    The official archive is downloaded if nothing is there.

    Raises:
        UserError: there is nothing and the download fails, or what is there is damaged.
    """
    source = Digits() if dataset == "digits" else _find_cifar10(Path(data_dir))
    try:
        source.check()
    except OSError as error:
        raise UserError(f"{data_dir}: cannot be read ({error.strerror or error})") from None
    return source


def _find_cifar10(folder: Path) -> Source:
    for name in ("cifar-10-batches-py", "cifar-10-python.tar.gz"):
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


def cache_folder() -> Path:
    """The node's own folder for decoded data sets: ``$CIFAR_DIST_CACHE``, else the user's cache.

    Raises:
        UserError: the folder cannot be made or written.
    """
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("CIFAR_DIST_CACHE") or Path(user_cache) / "cifar_dist").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable_cache(folder, error) from None
    return folder


def _unwritable_cache(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: the decoded data set cannot be written there ({error.strerror}); "
        "name another folder in the environment variable CIFAR_DIST_CACHE"
    )


@dataclass(frozen=True)
class CachedDataset:
    """A decoded data set on this node's disk. Small: holds what is about the images, not them."""

    path: Path
    name: str
    fingerprint: str
    """SHA-256 over the source's bytes."""
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    """Of each channel over the original training images, 0..1."""
    std: tuple[float, ...]
    original_images: int
    """Original training images: `train_images` and `validation_images`."""
    test_images: int

    @property
    def validation_images(self) -> int:
        """How many of the original training images are held out for validation."""
        return self.original_images // HELD_OUT_SHARE

    @property
    def train_images(self) -> int:
        """How many of the original training images are trained on."""
        return self.original_images - self.validation_images

    def steps_per_epoch(self, batch_size: int) -> int:
        """Optimizer steps in an epoch."""
        return len(batch_bounds(self.train_images, batch_size)) - 1

    def check_batches(self, batch_size: int, world_size: int) -> None:
        """See that every rank gets enough images of every batch.

        Raises:
            UserError: one would get fewer than the 2 images that batch normalisation needs.
        """
        smallest = int(np.diff(batch_bounds(self.train_images, batch_size)).min())
        if smallest // world_size < 2:
            raise UserError(
                f"--batch-size {batch_size}: the smallest batch of {self.train_images} images has "
                f"{smallest}, and {world_size} workers need 2 each, {2 * world_size} in all; "
                "choose another --batch-size or fewer workers"
            )

    def open(self) -> tuple[LabelledImages, LabelledImages]:
        """Training and test images, mapped from the file: read when touched, shared by processes."""
        arrays = _mapped(self.path)
        return (
            LabelledImages(arrays["train_images"], arrays["train_labels"]),
            LabelledImages(arrays["test_images"], arrays["test_labels"]),
        )


def prepare(dataset: str, source: Source) -> CachedDataset:
    """The decoded data set on this node, decoded now unless some process did so before.

    Args:
        dataset: its name, ``cifar10`` or ``digits``.
        source: what it is decoded from.

    Raises:
        UserError: a damaged source, or a cache folder that cannot be written.
    """
    fingerprint = source.fingerprint()
    path = _cache_path(dataset, fingerprint)
    try:
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _write(path, dataset, fingerprint, source.decode())
    except OSError as error:
        raise _unwritable_cache(path.parent, error) from None
    return _described(path)


def prepare_same(dataset: str, data_dir: str | Path, fingerprint: str) -> CachedDataset:
    """The data set that another node decoded, on this node.

    Where this node's cache holds it, ``data_dir`` is not even looked at.

    Raises:
        UserError: as `find_source` and `prepare`, or ``data_dir`` holds other data here.
    """
    path = _cache_path(dataset, fingerprint)
    if path.exists():
        return _described(path)
    found = prepare(dataset, find_source(dataset, data_dir))
    if found.fingerprint != fingerprint:
        raise UserError(
            f"{data_dir} on {socket.gethostname()}: holds other data ({found.fingerprint[:16]}) "
            f"than the driver's ({fingerprint[:16]}); give all nodes the same"
        )
    return found


def _cache_path(dataset: str, fingerprint: str) -> Path:
    return cache_folder() / f"{dataset}-{fingerprint[:16]}-v{_FORMAT}.safetensors"


def _write(path: Path, name: str, fingerprint: str, decoded: Decoded) -> None:
    from safetensors.numpy import save_file

    statistics = ChannelStatistics()
    statistics.update(decoded.train.images)
    about = {
        "name": name,
        "fingerprint": fingerprint,
        "classes": decoded.classes,
        "mean": statistics.mean.tolist(),
        "std": statistics.std.tolist(),
        "original_images": len(decoded.train.images),
        "test_images": len(decoded.test.images),
    }
    arrays = {
        f"{split_name}_{field.name}": getattr(images, field.name)
        for split_name, images in (("train", decoded.train), ("test", decoded.test))
        for field in dataclasses.fields(images)
    }
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(arrays, aside, metadata={"about": json.dumps(about)})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _described(path: Path) -> CachedDataset:
    about = json.loads(_header(path)[0]["__metadata__"]["about"])
    for name in ("classes", "mean", "std"):
        about[name] = tuple(about[name])
    return CachedDataset(path=path, **about)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and the position of the first byte behind it."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def _mapped(path: Path) -> dict[str, NDArray[np.uint8]]:
    """Every array of a safetensors file of bytes, mapped copy-on-write.

    The safetensors library maps for torch only, and the driver does without torch.
    """
    header, start = _header(path)
    return {
        name: np.memmap(
            path, np.uint8, "c", offset=start + entry["data_offsets"][0], shape=tuple(entry["shape"])
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


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


@functools.cache
def _torchvision() -> Any:
    import torchvision

    return torchvision


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
