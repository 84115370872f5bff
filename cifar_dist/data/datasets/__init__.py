"""Data sets: where images come from, how they are found, checked and decoded.

A data set is a file, here or elsewhere, and a line in `cifar_dist.registry.DATASETS` that names a
function of it. The function takes the folder of ``--data-dir``, and returns a `Source`, or None
where the folder holds nothing of the data set; it downloads nothing. Facts that settings need
beforehand are noted on it with `cifar_dist.registry.with_traits`; all others (names of the classes,
size and channels of the images) are those of what the source decodes.

At import this loads no NumPy, see `with_traits`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cifar_dist.errors import UserError
from cifar_dist.registry import DATASETS, dataset_traits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_NAMES_SHOWN = 6


@dataclass(frozen=True)
class LabelledImages:
    """Images of one split."""

    images: NDArray[np.uint8]
    """``[n, channels, side, side]``"""
    labels: NDArray[np.integer[Any]]
    """``[n]`` numbers of classes, from 0."""


@dataclass(frozen=True)
class Decoded:
    """A whole data set in memory."""

    train: LabelledImages
    """The original training images, validation images among them."""
    test: LabelledImages
    classes: tuple[str, ...]
    """Names of the classes, in the order of their numbers."""


class Source(Protocol):
    """Something a data set can be decoded from.

    One whose fingerprints were others in earlier versions also has `earlier_fingerprints`.
    """

    def check(self) -> None:
        """Look for damage as far as that is quick.

        Raises:
            UserError: what is there is damaged or is not this data set.
        """

    def image_side(self) -> int:
        """Return the height and width of every image, in pixels, without decoding them all.

        Raises:
            UserError: what is there is damaged or is not this data set.
        """

    def fingerprint(self) -> str:
        """Return a SHA-256 that only sources of the same images and labels have.

        It is of what `decode` reads, never of files that lie beside it.
        """

    def decode(self) -> Decoded:
        """Return all images.

        Raises:
            UserError: what is there is damaged or is not this data set.
        """


@dataclass(frozen=True)
class Arrays:
    """A source that is decoded already, e.g. by a few lines of a data set's own."""

    decoded: Decoded

    def check(self) -> None:
        """Check nothing: there is no file."""

    def image_side(self) -> int:
        side: int = self.decoded.train.images.shape[-1]
        return side

    def fingerprint(self) -> str:
        found = hashlib.sha256("\n".join(self.decoded.classes).encode())
        for part in (self.decoded.train, self.decoded.test):
            found.update(part.images.tobytes())
            # Of one type, so that equal labels are equal data.
            found.update(part.labels.astype("<i8").tobytes())
        return found.hexdigest()

    def decode(self) -> Decoded:
        return self.decoded


def find_source(dataset: str, data_dir: str | Path, download: bool = True) -> Source:
    """Return what a data set can be decoded from, checked as far as that is quick.

    Args:
        dataset: its name in the registry.
        data_dir: the folder to look in.
        download: whether to download there what is missing, if that is possible.

    Raises:
        UserError: nothing is there and the download fails, or what is there is damaged.
    """
    find, traits, folder = DATASETS[dataset], dataset_traits(dataset), Path(data_dir)
    title = traits.title or dataset
    try:
        source: Source | None = find(folder)
        if source is None and folder.is_file():
            raise UserError(f"{data_dir}: is a file, and no archive of {title}; name its folder")
        if source is None and download and traits.download is not None:
            traits.download(folder)
            source = find(folder)
        if source is None:
            raise UserError(
                f"{data_dir}: has no {title}; name the folder that does with --data-dir "
                f"({contents(folder)})"
            )
        source.check()
    except OSError as error:
        where = error.filename or data_dir
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None
    return source


def earlier_fingerprints(source: Source) -> Iterable[str]:
    """Return the fingerprints that earlier versions gave a source, computed when asked for."""
    found: Iterable[str] = getattr(source, "earlier_fingerprints", tuple)()
    return found


def contents(folder: Path) -> str:
    """Return what is in a folder, formatted for a message."""
    if not folder.is_dir():
        return "there is no such folder"
    names = sorted(f"{each.name}/" if each.is_dir() else each.name for each in folder.iterdir())
    if not names:
        return "it is empty"
    more = f" and {len(names) - _NAMES_SHOWN:,} more" if len(names) > _NAMES_SHOWN else ""
    return f"it holds {', '.join(names[:_NAMES_SHOWN])}{more}"


def sha256_of_files(files: Iterable[Path]) -> str:
    """Return a SHA-256 over files' contents, in order.

    Their names do not count, so that a renamed folder is the same data.
    """
    # Digests are joined, not contents: bytes that move from the end of a file to the start of the
    # next are other data.
    digests = "".join(file_digest("sha256", file) for file in files)
    return hashlib.sha256(digests.encode()).hexdigest()


def file_digest(algorithm: str, file: Path) -> str:
    """Return the hexadecimal digest of a file's content, e.g. by ``md5``."""
    with file.open("rb") as opened:
        # Read in blocks, so that an archive need not fit in memory.
        return hashlib.file_digest(opened, algorithm).hexdigest()
