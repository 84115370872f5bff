"""What is done to a batch of images: crop, flip, cutout, normalise, resize. CPU or GPU.

Shapes: B images, C channels, H and W height and width.

What is random is drawn on the CPU, as a pure function of (seed, epoch, image); what is done
with it runs where the images are, on the whole batch at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cifar_dist.data.philox import Stream, below, random_words


class Draws(NamedTuple):
    """What was drawn for each of B images; all ``[B]`` int64."""

    top: Tensor
    """First row of the crop in the padded image, 0 to 2 * padding."""
    left: Tensor
    """First column of the crop in the padded image, 0 to 2 * padding."""
    flip: Tensor
    """1 where the image is mirrored left to right, else 0."""
    cutout_row: Tensor
    """Row of the middle of the blanked square."""
    cutout_column: Tensor
    """Column of the middle of the blanked square."""


@dataclass(frozen=True)
class Augmentation:
    """Random crop, flip and cutout of training images."""

    padding: int
    """Pixels of padding on each side before the crop."""
    flip: float
    """Probability of a horizontal flip."""
    cutout: int
    """Side of the blanked square in pixels, 0 for none (DeVries and Taylor 2017)."""
    padding_mode: str = "constant"
    """What the padding shows, in torchvision's terms: ``constant`` (zeros) or ``reflect`` (the
    image mirrored at its edge, whose pixels are not repeated)."""

    def draw(self, seed: int, epoch: int, images: NDArray[np.int64], size: int) -> Draws:
        """The draws for ``[B]`` images of ``size`` pixels a side in an epoch (0-based)."""
        words = random_words(seed, Stream.CROP_AND_FLIP, epoch, images)
        offsets = 2 * self.padding + 1
        # Compared as numbers below 2**32, so that probabilities 0 and 1 mean never and always.
        flipped = words[:, 2] < self.flip * 2.0**32
        middles = np.zeros((len(images), 2), np.int64)
        if self.cutout:
            middles = below(random_words(seed, Stream.CUTOUT, epoch, images)[:, :2], size)
        columns = (
            below(words[:, 0], offsets),
            below(words[:, 1], offsets),
            flipped.astype(np.int64),
            np.ascontiguousarray(middles[:, 0]),
            np.ascontiguousarray(middles[:, 1]),
        )
        return Draws(*map(torch.from_numpy, columns))

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Crop and flip ``[B, C, H, W]`` images of any type; one gather for the whole batch."""
        if self.padding == 0 and self.flip == 0:
            return images
        count, channels, height, width = images.shape
        reflect = self.padding_mode == "reflect"
        padded = images if reflect else F.pad(images, (self.padding,) * 4)
        rows = draws.top[:, None] + torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device).expand(count, width)
        columns = torch.where(draws.flip[:, None] == 1, columns.flip(1), columns)
        columns = draws.left[:, None] + columns
        if reflect:
            # By index, for bytes on any device: nothing is padded or copied before the gather.
            rows = _reflected(rows - self.padding, height)
            columns = _reflected(columns - self.padding, width)
        pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
        pixels = pixels.view(count, 1, -1).expand(-1, channels, -1)
        return padded.reshape(count, channels, -1).gather(2, pixels).view(images.shape)

    def blank(self, images: Tensor, draws: Draws) -> Tensor:
        """Set a square of each normalised ``[B, C, H, W]`` image to 0, the mean colour.

        A square that reaches over the image's edge is cut off there, as in the paper.
        """
        if self.cutout == 0:
            return images
        half = self.cutout // 2

        def outside(middle: Tensor, size: int) -> Tensor:
            offset = torch.arange(size, device=images.device) - middle[:, None] + half
            return (offset < 0) | (offset >= self.cutout)

        rows = outside(draws.cutout_row, images.shape[2])
        columns = outside(draws.cutout_column, images.shape[3])
        return images * (rows[:, None, :, None] | columns[:, None, None, :])


def _reflected(index: Tensor, size: int) -> Tensor:
    """Map indices from ``1 - size`` to ``2 * size - 2`` into an axis of ``size`` pixels.

    Those outside are mirrored at the first and the last pixel, as by ``F.pad(mode="reflect")``.
    """
    return (size - 1) - ((size - 1) - index.abs()).abs()


@dataclass(frozen=True)
class Normalisation:
    """From bytes to numbers around 0, and to the side that the network sees."""

    mean: tuple[float, ...]
    """Of each channel, with pixel values scaled to 0..1."""
    std: tuple[float, ...]
    """Of each channel, likewise."""
    size: int
    """Side of the result in pixels."""

    def apply(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` bytes to float32 ``(pixel / 255 - mean) / std``."""
        mean = torch.tensor(self.mean, device=images.device).mul_(255).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).mul_(255).view(-1, 1, 1)
        return images.float().sub_(mean).div_(std)

    def resize(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``size`` x ``size`` pixels, bilinear with antialiasing."""
        if images.shape[-1] == images.shape[-2] == self.size:
            return images
        side = (self.size, self.size)
        return F.interpolate(images, side, mode="bilinear", antialias=True, align_corners=False)
