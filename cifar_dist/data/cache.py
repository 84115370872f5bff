"""The decoded data set: made once a node, one file of bytes that every process maps.

All workers of a node map the same file, so the images are in memory once. Its name holds a
fingerprint of what it was made from: other data, another file. No torch here: the driver does
without it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from cifar_dist.data.order import batch_bounds, split
from cifar_dist.data.sources import (
    Decoded,
    LabelledImages,
    Source,
    find_source,
    has_cifar10,
)
from cifar_dist.data.statistics import ChannelStatistics
from cifar_dist.errors import UserError

HELD_OUT_SHARE = 10
"""One in this many training images is held out for validation."""
_FORMAT = "1"
"""Part of a cached file's name: raise it when what is written changes."""


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


class DatasetInfo(NamedTuple):
    """What must be known of a model's data set to use the model."""

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    """Of each channel over the original training images, 0..1."""
    std: tuple[float, ...]


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

    @property
    def about(self) -> DatasetInfo:
        """What a model that is trained on it must be used with."""
        return DatasetInfo(self.name, self.classes, self.mean, self.std)

    def part(self, name: str) -> tuple[LabelledImages, NDArray[np.int64]]:
        """A split's images, mapped, and the numbers of those that belong to it.

        Args:
            name: ``train``, ``val`` or ``test``.
        """
        train, test = self.open()
        if name == "test":
            return test, np.arange(self.test_images)
        kept, held_out = split(self.original_images, held_out=self.validation_images)
        return train, {"train": kept, "val": held_out}[name]

    def open(self) -> tuple[LabelledImages, LabelledImages]:
        """Training and test images, mapped: read when touched, shared by all processes."""
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


def find_same(dataset: str, data_dir: str | Path, fingerprint: str) -> CachedDataset:
    """The data set of that fingerprint, from this node's cache or a folder; never downloaded.

    Raises:
        UserError: neither has it, or the folder's is damaged.
    """
    path = _cache_path(dataset, fingerprint)
    if path.exists():
        return _described(path)
    if dataset == "cifar10" and not has_cifar10(Path(data_dir)):
        raise UserError(f"{data_dir}: has no CIFAR-10; name the folder that does with --data-dir")
    found = prepare(dataset, find_source(dataset, data_dir))
    if found.fingerprint != fingerprint:
        raise UserError(
            f"{data_dir}: holds other data than the run was trained on; name the folder that it "
            "was trained on with --data-dir"
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
            path,
            np.uint8,
            "c",
            offset=start + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }
