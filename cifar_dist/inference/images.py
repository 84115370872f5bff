"""Pictures of any kind and size, as the network was trained to see images."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cifar_dist.data.sources import SIDE
from cifar_dist.errors import first_line


def read_picture(source: Path | bytes) -> NDArray[np.uint8]:
    """``[3, 32, 32]`` bytes: the middle square of a picture, upright, made small; alpha on white.

    A picture of 32x32 pixels comes out as it is.

    Raises:
        ValueError: it cannot be read; the message is one line.
    """
    opened = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(opened) as file:
                picture = ImageOps.exif_transpose(file)
                if picture.has_transparency_data:
                    layer = picture.convert("RGBA")
                    white = Image.new("RGBA", layer.size, "white")
                    picture = Image.alpha_composite(white, layer)
                square = ImageOps.fit(
                    picture.convert("RGB"), (SIDE, SIDE), Image.Resampling.BILINEAR
                )
    # Pillow's readers raise whatever a broken file makes them.
    except Exception as error:
        said = getattr(error, "strerror", None) or first_line(error)
        if isinstance(error, UnidentifiedImageError):
            said = "is no image"
        raise ValueError(said) from None
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def pictures_in(folder: Path) -> list[Path]:
    """The files in a folder, and in those in it, whose names are of kinds that can be read."""
    Image.init()
    kinds = set(Image.registered_extensions())
    return sorted(
        file for file in folder.rglob("*") if file.suffix.lower() in kinds and file.is_file()
    )
