"""The decoded data set: made once a node, one file that every process maps.

All workers of a node map the same file, so the images are in memory once. Its name holds a
fingerprint of what it was made from: other data, another file. Nothing here imports torch, which
would delay the driver by seconds.
"""

from __future__ import annotations

import functools
import hashlib
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from cifar_dist.data import cached_file
from cifar_dist.data.datasets import (
    Decoded,
    LabelledImages,
    Source,
    earlier_fingerprints,
    find_source,
)
from cifar_dist.data.order import batch_bounds, split
from cifar_dist.data.statistics import ChannelStatistics
from cifar_dist.errors import UserError
from cifar_dist.events import Listener, Warned, ignore
from cifar_dist.storage import on_disk, user_cache

HELD_OUT_SHARE = 10
"""One in this many training images is held out for validation."""
MOST_COPIES = 0.01
"""Share of the validation or test images that may be trained on, too, before that is refused."""
_FORMAT = "3"
"""Part of a cached file's name: raise it when what is written changes. Format 1 held labels as
uint8, whatever the number of classes: 299 became 43. Format 2 had no digest, and its images were
not searched for copies."""


def cache_folder() -> Path:
    """Return the node's folder for decoded data sets: ``$CIFAR_DIST_CACHE``, or the user's cache.

    Raises:
        UserError: the folder cannot be made, or there is no home directory.
    """
    given = os.environ.get("CIFAR_DIST_CACHE")
    folder = on_disk(given) if given else user_cache("CIFAR_DIST_CACHE").absolute() / "cifar_dist"
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


class DatasetInfo(NamedTuple):
    """Facts about a model's data set that using the model takes."""

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    """Of each channel over the original training images, 0..1."""
    std: tuple[float, ...]
    side: int = 32
    """Height and width of the images in pixels; the default is that of runs that do not say it."""

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return len(self.mean)


@dataclass(frozen=True)
class CachedDataset:
    """A decoded data set on this node's disk. Small: holds what is about the images, not them."""

    path: Path
    name: str
    fingerprint: str
    """SHA-256 over the source's bytes."""
    classes: tuple[str, ...]
    image_side: int
    """Height and width of every image, in pixels."""
    channels: int
    """Of every image, e.g. 3."""
    mean: tuple[float, ...]
    """Of each channel over the original training images, 0..1."""
    std: tuple[float, ...]
    original_images: int
    """Original training images: `train_images` and `validation_images`."""
    test_images: int

    @property
    def validation_images(self) -> int:
        """Original training images that are held out for validation."""
        return self.original_images // HELD_OUT_SHARE

    @property
    def train_images(self) -> int:
        """Original training images that are trained on."""
        return self.original_images - self.validation_images

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of optimizer steps in an epoch."""
        return len(batch_bounds(self.train_images, batch_size)) - 1

    def check_batches(self, batch_size: int, world_size: int) -> None:
        """Check that every rank gets enough images of every batch.

        Raises:
            UserError: one would get fewer than the 2 images that batch normalisation needs.
        """
        smallest = int(np.diff(batch_bounds(self.train_images, batch_size)).min())
        # Ranks' parts of a batch differ by at most one image, so the smallest has this many.
        if smallest // world_size < 2:
            raise UserError(
                f"--batch-size {batch_size}: the smallest batch of {self.train_images} images has "
                f"{smallest}, and {world_size} workers need 2 each, {2 * world_size} in all; "
                "choose another --batch-size or fewer workers"
            )

    @property
    def about(self) -> DatasetInfo:
        """Return the facts that a model trained on it must be used with."""
        return DatasetInfo(self.name, self.classes, self.mean, self.std, self.image_side)

    def part(self, name: str) -> tuple[LabelledImages, NDArray[np.int64]]:
        """Return a split's images, mapped, and the numbers of those that belong to it.

        Args:
            name: ``train``, ``val`` or ``test``.
        """
        train, test = self.open()
        if name == "test":
            return test, np.arange(self.test_images)
        kept, held_out = split(self.original_images, held_out=self.validation_images)
        return train, {"train": kept, "val": held_out}[name]

    def open(self) -> tuple[LabelledImages, LabelledImages]:
        """Return training and test images, mapped: read when touched, shared by all processes."""
        arrays = cached_file.mapped(self.path)
        return (
            LabelledImages(arrays["train_images"], arrays["train_labels"]),
            LabelledImages(arrays["test_images"], arrays["test_labels"]),
        )


def prepare(
    dataset: str, source: Source, started_with: str | None = None, listener: Listener = ignore
) -> CachedDataset:
    """Return the decoded data set on this node, decoded now unless some process did so before.

    Args:
        dataset: its name in the registry.
        source: what it is decoded from.
        started_with: the fingerprint that a run's data set has. It stays the data set's where it
            is the source's by the rule of an earlier version.
        listener: notified of a file in the cache that is damaged, and of copies among the images.

    Raises:
        UserError: a damaged source, labels that are no classes, images that are validated and
            trained on, or a cache folder that cannot be written.
    """
    fingerprint = source.fingerprint()
    if started_with not in (None, fingerprint) and started_with in earlier_fingerprints(source):
        fingerprint = started_with
    path = _cache_path(dataset, fingerprint)
    try:
        # Without the lock, which takes a folder that can be written.
        if path.exists() and cached_file.is_intact(path):
            return _described(path)
        # A node's workers start at once: one decodes, the others wait and find the file.
        with FileLock(path.with_suffix(".lock")):
            if path.exists():
                if cached_file.is_intact(path):
                    return _described(path)
                listener(Warned(f"{path}: is damaged, e.g. by a power cut; decoding the data anew"))
            for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
                left.unlink()
            _write(path, dataset, fingerprint, _decoded(dataset, source), listener)
    except OSError as error:
        raise _unwritable_cache(path.parent, error) from None
    return _described(path)


def prepare_same(
    dataset: str, data_dir: str | Path, fingerprint: str, listener: Listener = ignore
) -> CachedDataset:
    """Return, on this node, the data set that another node decoded.

    Where this node's cache holds it, ``data_dir`` is not even read.

    Args:
        dataset: its name in the registry.
        data_dir: the folder with its source on this node.
        fingerprint: of the data set.
        listener: as for `prepare`.

    Raises:
        UserError: as `find_source` and `prepare`, or ``data_dir`` holds other data here.
    """
    if (kept := _kept(dataset, fingerprint)) is not None:
        return kept
    found = prepare(dataset, find_source(dataset, data_dir), fingerprint, listener)
    if found.fingerprint != fingerprint:
        raise UserError(
            f"{data_dir} on {socket.gethostname()}: holds other data ({found.fingerprint[:16]}) "
            f"than the driver's ({fingerprint[:16]}); give all nodes the same"
        )
    return found


def find_same(dataset: str, data_dir: str | Path, fingerprint: str) -> CachedDataset:
    """Return the data set of a fingerprint, from this node's cache or a folder; never downloaded.

    Raises:
        UserError: neither has it, or the folder's is damaged.
    """
    if (kept := _kept(dataset, fingerprint)) is not None:
        return kept
    found = prepare(dataset, find_source(dataset, data_dir, download=False), fingerprint)
    if found.fingerprint != fingerprint:
        raise UserError(
            f"{data_dir}: holds other data than the run was trained on; name the folder that it "
            "was trained on with --data-dir"
        )
    return found


def _kept(dataset: str, fingerprint: str) -> CachedDataset | None:
    """Return a data set of this node's cache, where it is there and intact."""
    path = _cache_path(dataset, fingerprint)
    try:
        found = path.stat()
        # Once a process: a process may train many trials on the same file.
        return _described(path) if _intact_since(path, found.st_ino, found.st_mtime_ns) else None
    except OSError:
        return None


@functools.lru_cache(maxsize=8)
def _intact_since(path: Path, inode: int, modified: int) -> bool:
    return cached_file.is_intact(path)


def _cache_path(dataset: str, fingerprint: str) -> Path:
    return cache_folder() / f"{dataset}-{fingerprint[:16]}-v{_FORMAT}.safetensors"


def _decoded(dataset: str, source: Source) -> Decoded:
    try:
        return source.decode()
    except OSError as error:  # not one of the cache, which is written later
        where = error.filename or f"--dataset {dataset}"
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None


def _write(path: Path, name: str, fingerprint: str, decoded: Decoded, listener: Listener) -> None:
    # Checked before anything is written: what lies in the cache is trusted from then on.
    _check_decoded(name, decoded)
    _check_copies(name, decoded, listener)
    _, channels, side, _ = decoded.train.images.shape
    statistics = ChannelStatistics(channels)
    statistics.update(decoded.train.images)
    about = {
        "name": name,
        "fingerprint": fingerprint,
        "classes": decoded.classes,
        "image_side": side,
        "channels": channels,
        "mean": statistics.mean.tolist(),
        "std": statistics.std.tolist(),
        "original_images": len(decoded.train.images),
        "test_images": len(decoded.test.images),
    }
    labels = cached_file.label_type(len(decoded.classes))
    arrays: dict[str, NDArray[Any]] = {}
    for split_name, part in (("train", decoded.train), ("test", decoded.test)):
        arrays[f"{split_name}_images"] = part.images
        arrays[f"{split_name}_labels"] = part.labels.astype(labels)
    cached_file.write(path, about, arrays)


def _check_decoded(name: str, decoded: Decoded) -> None:
    """Check that images are square and all of one size, and labels numbers of classes.

    Raises:
        UserError: some are not.
    """
    shape, last = decoded.train.images.shape[1:], len(decoded.classes) - 1
    for part in (decoded.train, decoded.test):
        images, labels = part.images, part.labels
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape:
            raise UserError(
                f"--dataset {name}: has images of {images.dtype} {list(images.shape)}; all must be "
                "uint8 [n, channels, side, side], of one size"
            )
        if images.shape[2] != images.shape[3]:
            raise UserError(
                f"--dataset {name}: has images of {images.shape[3]}x{images.shape[2]} pixels; make "
                "them square"
            )
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or not len(labels):
            raise UserError(
                f"--dataset {name}: has labels of {labels.dtype} {list(labels.shape)} for "
                f"{len(images)} images; each needs one, the number of its class"
            )
        if labels.min() < 0 or labels.max() > last:
            raise UserError(
                f"--dataset {name}: has labels from {labels.min()} to {labels.max()}, outside 0 to "
                f"{last}, its {last + 1} classes"
            )


def _check_copies(name: str, decoded: Decoded, listener: Listener) -> None:
    """Check that images to validate and test on are not trained on, to the last pixel.

    Raises:
        UserError: more are than a collected data set has by chance. Fewer are a warning: well-known
            data sets have some, and their results are compared as they are.
    """
    kept, held_out = split(len(decoded.train.images), len(decoded.train.images) // HELD_OUT_SHARE)
    trained_on = set(_digests(decoded.train.images, kept))
    for title, images, members in (
        ("validation", decoded.train.images, held_out),
        ("test", decoded.test.images, range(len(decoded.test.images))),
    ):
        copies = sum(digest in trained_on for digest in _digests(images, members))
        if not copies:
            continue
        said = (
            f"--dataset {name}: {copies:,} of {len(members):,} {title} images are also trained on: "
            "training images have the same pixels"
        )
        if copies > len(members) * MOST_COPIES:
            raise UserError(f"{said}; remove the copies, e.g. a second copy of a file")
        listener(Warned(f"{said}; its accuracy is that much too high at most"))


def _digests(images: NDArray[np.uint8], members: Iterable[int]) -> Iterator[bytes]:
    """Yield a digest of each of these images."""
    return (hashlib.blake2b(images[each].tobytes(), digest_size=16).digest() for each in members)


def _described(path: Path) -> CachedDataset:
    about = cached_file.read_about(path)
    for name in ("classes", "mean", "std"):
        about[name] = tuple(about[name])
    return CachedDataset(path=path, **about)
