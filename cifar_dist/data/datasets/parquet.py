"""Parquet files in the Hugging Face layout, which several data sets may come in."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cifar_dist.data.datasets import Decoded, LabelledImages, sha256_of_files
from cifar_dist.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGE_COLUMNS = ("img", "image")


@dataclass(frozen=True)
class Parquet:
    """Parquet files with encoded images: columns ``img`` or ``image`` (bytes), and ``label``."""

    train: tuple[Path, ...]
    test: tuple[Path, ...]
    classes: tuple[str, ...] | None = None
    """Names of the classes where the files do not say them; None for the classes' numbers."""
    side: int | None = None
    """Height and width that every image must have, in pixels; None for those of the first."""
    label: str = "label"
    """The column of the classes' numbers."""

    def check(self) -> None:
        for file in self.train + self.test:
            with _opened(file, self.label):
                pass

    def image_side(self) -> int:
        return _first_side(self.train[0], self.label) if self.side is None else self.side

    def fingerprint(self) -> str:
        return sha256_of_files(self.train + self.test)

    def decode(self) -> Decoded:
        # Labels first: wrong ones are refused before images are decoded, which takes far longer.
        labels = {file: _labels(file, self.label) for file in self.train + self.test}
        most = max(int(labels[file].max()) for file in self.train)
        classes = (
            _class_names(self.train[0], self.label)
            or self.classes
            or tuple(str(number) for number in range(most + 1))
        )
        for file, found in labels.items():
            if found.min() < 0 or found.max() >= len(classes):
                raise UserError(
                    f"{file}: has labels outside 0 to {len(classes) - 1}; fetch it again, or "
                    "choose the data set that it belongs to with --dataset"
                )
        side = self.image_side()

        def decoded(files: tuple[Path, ...]) -> LabelledImages:
            images = np.concatenate([_images(file, side, self.label) for file in files])
            return LabelledImages(images, np.concatenate([labels[file] for file in files]))

        return Decoded(decoded(self.train), decoded(self.test), classes)


def find_parquet(
    folder: Path,
    classes: tuple[str, ...] | None = None,
    side: int | None = None,
    label: str = "label",
) -> Parquet | None:
    """Return the Parquet files in a folder and those in it; None where there are none.

    Args:
        folder: where to look.
        classes: see `Parquet`.
        side: see `Parquet`.
        label: see `Parquet`.

    Raises:
        UserError: a split is missing.
    """
    train, test = (
        # Sorted: file systems list a folder in their own order, on which the fingerprint and the
        # images' numbers would depend.
        tuple(sorted([*folder.glob(f"{name}*.parquet"), *folder.glob(f"*/{name}*.parquet")]))
        for name in ("train", "test")
    )
    if train and test:
        return Parquet(train, test, classes, side, label)
    if train or test:
        there, missing = ("train", "test") if train else ("test", "train")
        raise UserError(
            f"{folder}: has {there}*.parquet but no {missing}*.parquet; both splits are needed"
        )
    return None


@contextmanager
def _opened(file: Path, label: str) -> Iterator[tuple[pq.ParquetFile, str]]:
    """Open a file, and find the name of its column of images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            images = next((name for name in IMAGE_COLUMNS if name in names), None)
            if images is None or label not in names:
                raise UserError(
                    f"{file}: has columns {', '.join(names)}; needs img or image, and {label}"
                )
            if not parquet.metadata.num_rows:
                raise UserError(f"{file}: holds no images; fetch it again")
            yield parquet, images
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file}: is no readable Parquet file ({first_line(error)}); fetch it again"
        ) from None


def _class_names(file: Path, label: str) -> tuple[str, ...] | None:
    """Return the class names that the ``datasets`` library writes into a file's schema, if any."""
    with _opened(file, label) as (parquet, _):
        metadata = parquet.schema_arrow.metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, ValueError, TypeError):
        return None


def _labels(file: Path, label: str) -> NDArray[np.int64]:
    import pyarrow as pa

    with _opened(file, label) as (parquet, _):
        column = parquet.read(columns=[label])[label]
    try:
        numbers = column.cast(pa.int64())
        if numbers.null_count:
            raise UserError(f"{file}: has {numbers.null_count:,} images without a label")
    except pa.ArrowException:
        raise UserError(
            f"{file}: column {label} holds {column.type}; needs numbers of classes, from 0"
        ) from None
    found: NDArray[np.int64] = numbers.to_numpy()
    return found


def _images(file: Path, side: int, label: str) -> NDArray[np.uint8]:
    """Return a file's ``[n, 3, side, side]`` images."""
    with _opened(file, label) as (parquet, column):
        encoded = _cells(parquet.read(columns=[column]))
    images = np.empty((len(encoded), 3, side, side), np.uint8)

    def decode(row: int) -> None:
        try:
            images[row] = _decoded_image(encoded[row], side)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{file}: row {row} is no {side}x{side} image ({first_line(error)}); fetch it again"
            ) from None

    # Threads, which fill one array: processes would send every decoded image back.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Every result is asked for: an error in a thread is raised nowhere else.
        list(pool.map(decode, range(len(encoded)), chunksize=1000))
    return images


def _cells(table: pa.Table) -> list[bytes]:
    """Return the encoded images of a table's only column."""
    import pyarrow as pa

    # In one chunk, since a chunked column cannot be asked for a field of its structs.
    column = table[0].combine_chunks()
    found: list[bytes] = (
        column.field("bytes") if pa.types.is_struct(column.type) else column
    ).to_pylist()
    return found


def _decoded_image(encoded: bytes, side: int) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        # Pillow has read the header alone so far: an image of another size is never decoded.
        if image.size != (side, side):
            raise ValueError(f"it has {image.width}x{image.height} pixels")
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _first_side(file: Path, label: str) -> int:
    """Return the side of a file's first image, which must be square."""
    import pyarrow as pa
    from PIL import Image

    with _opened(file, label) as (parquet, column):
        batch = next(parquet.iter_batches(batch_size=1, columns=[column]))
        cell = _cells(pa.Table.from_batches([batch]))[0]
    try:
        with Image.open(io.BytesIO(cell)) as image:
            if image.width == image.height:
                return image.width
            said = f"it has {image.width}x{image.height} pixels"
    except (OSError, ValueError, TypeError) as error:
        said = first_line(error)
    raise UserError(f"{file}: row 0 is no square image ({said}); fetch it again")
