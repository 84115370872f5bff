"""Pictures of any kind and size, as images of the size that a network was trained on."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from cifar_dist.errors import first_line

_MODES = {1: "L", 3: "RGB"}
"""Pillow's names of kinds of images, by their channels."""


def read_picture(source: Path | bytes, side: int, channels: int = 3) -> NDArray[np.uint8]:
    """Return the middle square of a picture, upright, resized, and with alpha on white.

    A picture of ``side`` x ``side`` pixels comes out as it is.

    Args:
        source: a file, or its content.
        side: height and width of the result, in pixels.
        channels: 3 for colour, 1 for grey.

    Returns:
        ``[channels, side, side]`` bytes.

    Raises:
        ValueError: it cannot be read; the message is one line.
    """
    opened = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            # Between once and twice its limit of 89 million pixels Pillow only warns, and then
            # decodes hundreds of megabytes for one file.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(opened) as file:
                # Cameras store what the sensor saw, and a tag that says how to turn it.
                picture = ImageOps.exif_transpose(file)
                if picture.has_transparency_data:
                    # Dropping alpha alone would show whatever colour transparent pixels happen to
                    # have.
                    layer = picture.convert("RGBA")
                    white = Image.new("RGBA", layer.size, "white")
                    picture = Image.alpha_composite(white, layer)
                square = ImageOps.fit(
                    picture.convert(_MODES[channels]), (side, side), Image.Resampling.BILINEAR
                )
    # Pillow's readers raise whatever a broken file makes them.
    except Exception as error:
        said = getattr(error, "strerror", None) or first_line(error)
        if isinstance(error, UnidentifiedImageError):
            said = "is no image"
        raise ValueError(said) from None
    pixels = np.asarray(square).reshape(side, side, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def pictures_in(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders whose names are of kinds that can be read."""
    Image.init()
    kinds = {name for name, kind in Image.registered_extensions().items() if _can_read(kind)}
    # Sorted, since file systems list a folder in an order of their own. The files that macOS puts
    # beside others on foreign disks, ._NAME, have their suffix and hold no image.
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in kinds and not file.name.startswith("._") and not file.is_dir()
    )


def is_picture(content: bytes) -> bool:
    """Return whether this is the content of a picture, broken or not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(io.BytesIO(content)).close()
    except UnidentifiedImageError:
        return False
    except Exception:  # of the reader of its kind
        return True
    return True


def _can_read(kind: str) -> bool:
    """Return whether Pillow can read a kind of file of which it knows the suffix."""
    # It registers kinds that it only writes, e.g. PDF, only identifies, e.g. MPEG, and those that
    # programs may add a reader for, e.g. HDF5.
    opened, _ = Image.OPEN.get("JPEG" if kind == "MPO" else kind, (None, None))
    only_known = isinstance(opened, type) and issubclass(opened, ImageFile.StubImageFile)
    return opened is not None and not only_known and kind != "MPEG"
