"""Parquet files in the Hugging Face layout, which several data sets may come in."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cifar_dist.data.datasets import (
    Decoded,
    LabelledImages,
    contents,
    file_digest,
    sha256_of_files,
)
from cifar_dist.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGE_COLUMNS = ("img", "image")
_SPLITS = frozenset({"train", "test"})
_WORDS = re.compile(r"[^a-z0-9]+")
"""What separates the words of a file's name."""
_SHARD = re.compile(r"(?:.*-)?(?P<number>\d+)-of-(?P<of>\d+)(?:\D.*)?|\d+")
"""The name of a shard, without its suffix: which one and of how many, or, from the Hub's own
conversion, which one. A browser appends to a second copy's name, other tools a hash."""


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
        for files in (self.train, self.test):
            _check_shards(files)
        _check_contents(self.train + self.test)

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
    train, test = (_files_of(folder, name) for name in ("train", "test"))
    if train and test:
        return Parquet(train, test, classes, side, label)
    if train or test:
        there, missing = ("train", "test") if train else ("test", "train")
        raise UserError(
            f"{folder}: has {there}*.parquet but no {missing}*.parquet; both splits are needed "
            f"({contents(folder)})"
        )
    return None


def _files_of(folder: Path, split: str) -> tuple[Path, ...]:
    """Return a split's files, in the order of their images.

    They are those whose names begin with the split's. Where there are none, any whose name or
    folder has it as a word: ``cifar10-train.parquet``, ``plain_text/train/0000.parquet``.
    """

    def named(file: Path) -> bool:
        # From the file's name to the outermost folder's: the first that says a split.
        parts = file.relative_to(folder).with_suffix("").parts[::-1]
        said = (_SPLITS.intersection(_WORDS.split(part.lower())) for part in parts)
        hidden = any(part.startswith(".") for part in parts)
        return not hidden and next(filter(None, said), set()) == {split}

    everywhere = ("*.parquet", "*/*.parquet", "*/*/*.parquet")
    # Sorted: file systems list a folder in their own order, on which the fingerprint and the
    # images' numbers would depend.
    begun = sorted([*folder.glob(f"{split}*.parquet"), *folder.glob(f"*/{split}*.parquet")])
    return tuple(
        begun or sorted(file for each in everywhere for file in folder.glob(each) if named(file))
    )


def _check_shards(files: tuple[Path, ...]) -> None:
    """Check that a split's shards, as far as their names number them, are all there, and once.

    Raises:
        UserError: one is missing, or there twice.
    """
    shards = [(file, shard) for file in files if (shard := _SHARD.fullmatch(file.stem))]
    found: dict[int, Path] = {}
    for file, shard in shards:
        first, of_first = shards[0]
        if shard["of"] != of_first["of"]:
            raise UserError(f"{file}: is a shard of other data than {first}; keep those of one")
        number = int(shard["number"] or shard[0])
        if (other := found.setdefault(number, file)) is not file:
            raise UserError(f"{file}: is the same shard as {other}; delete one of them")
    for file, shard in shards[:1]:
        # Without a count, only what is missing between two others can be known.
        numbers = range(int(shard["of"])) if shard["of"] else range(min(found), max(found))
        for number in numbers:
            if number not in found:
                begin, end = shard.span("number" if shard["of"] else 0)
                name = f"{file.name[:begin]}{number:0{end - begin}}{file.name[end:]}"
                raise UserError(f"{file.parent}: has {file.name} but no {name}; fetch it, too")


def _check_contents(files: tuple[Path, ...]) -> None:
    """Check that no file is a copy of another, whose images would count twice.

    Raises:
        UserError: two have the same content.
    """
    by_size: dict[int, list[Path]] = {}
    for file in files:
        by_size.setdefault(file.stat().st_size, []).append(file)
    seen: dict[str, Path] = {}
    for alike in by_size.values():
        for file in alike if len(alike) > 1 else ():
            if (other := seen.setdefault(file_digest("sha256", file), file)) is not file:
                raise UserError(
                    f"{file}: has the same content as {other}, and no image may be there twice; "
                    "delete or replace one of them"
                )


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
            if not _holds_bytes(kind := parquet.schema_arrow.field(images).type):
                raise UserError(
                    f"{file}: column {images} holds {kind}; needs encoded images: binary, or a "
                    "struct with a field bytes"
                )
            if not parquet.metadata.num_rows:
                raise UserError(f"{file}: holds no images; fetch it again")
            yield parquet, images
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file}: is no readable Parquet file ({first_line(error)}); fetch it again"
        ) from None


def _holds_bytes(kind: pa.DataType) -> bool:
    """Return whether cells of a type hold encoded images."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    types = pa.types
    # Null is the type of a column without any value, whose rows are refused with what they hold.
    known = types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_null
    return any(is_one(kind) for is_one in known)


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
        encoded = _cells(file, parquet.read(columns=[column]))
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


def _cells(file: Path, table: pa.Table) -> list[bytes]:
    """Return the encoded images of a table's only column.

    Raises:
        UserError: a row has none, e.g. only the path of one.
    """
    import pyarrow as pa

    # In one chunk, since a chunked column cannot be asked for a field of its structs.
    column = table[0].combine_chunks()
    values = column.field("bytes") if pa.types.is_struct(column.type) else column
    if values.null_count:
        row = values.is_null().index(True).as_py()
        raise UserError(
            f"{file}: {values.null_count:,} of {len(values):,} rows hold no image, the first is "
            f"row {row}: {column[row].as_py()}; write the images' bytes into the file"
        )
    found: list[bytes] = values.to_pylist()
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
        cell = _cells(file, pa.Table.from_batches([batch]))[0]
    try:
        with Image.open(io.BytesIO(cell)) as image:
            if image.width == image.height:
                return image.width
            said = f"it has {image.width}x{image.height} pixels"
    except (OSError, ValueError, TypeError) as error:
        said = first_line(error)
    raise UserError(f"{file}: row 0 is no square image ({said}); fetch it again")
