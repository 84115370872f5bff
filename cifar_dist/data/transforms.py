"""What is done to a batch of images: crop, flip, cutout, normalise, resize. CPU or GPU.

Shapes: B images, C channels, H and W height and width.

What is random is drawn on the CPU, as a pure function of (seed, epoch, image); what is done
with it runs where the images are, on the whole batch at once.
"""

from __future__ import annotations

import functools
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

    def draw(self, seed: int, epoch: int, images: int, size: int) -> NDArray[np.int64]:
        """Draw for every image of a data set, once an epoch.

        Args:
            seed: the run's.
            epoch: 0-based.
            images: number of images in the data set.
            size: an image's side in pixels.

        Returns:
            ``[5, images]``: the fields of `Draws`, in their order.
        """
        words = random_words(seed, Stream.CROP_AND_FLIP, epoch, images)
        drawn = np.zeros((len(Draws._fields), images), np.int64)
        drawn[0] = below(words[:, 0], 2 * self.padding + 1)
        drawn[1] = below(words[:, 1], 2 * self.padding + 1)
        # Compared as numbers below 2**64, so that probabilities 0 and 1 mean never and always.
        drawn[2] = words[:, 2].astype(np.float64) < self.flip * 2.0**64 if self.flip < 1 else 1
        if self.cutout:
            middles = random_words(seed, Stream.CUTOUT, epoch, images, words=2)
            drawn[3] = below(middles[:, 0], size)
            drawn[4] = below(middles[:, 1], size)
        return drawn

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Crop and flip ``[B, C, H, W]`` images of any type; one gather for the whole batch."""
        if self.padding == 0 and self.flip == 0:
            return images
        count, channels, height, width = images.shape
        pitch = width + 2 * self.padding
        # Pixel numbers in the padded image: of the window at its corner, moved to the crop.
        corner = draws.top * pitch + draws.left
        pixels = _windows(height, width, pitch, images.device).index_select(0, draws.flip)
        pixels = pixels + corner[:, None]
        if self.padding_mode == "reflect":
            # By index, for bytes on any device, and without a padded copy.
            pixels = _reflected(height, width, self.padding, images.device)[pixels]
        else:
            images = F.pad(images, (self.padding,) * 4)
        pixels = pixels.view(count, 1, -1).expand(-1, channels, -1)
        gathered = images.reshape(count, channels, -1).gather(2, pixels)
        return gathered.view(count, channels, height, width)

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


@functools.cache
def _windows(height: int, width: int, pitch: int, device: torch.device) -> Tensor:
    """``[2, H * W]`` numbers of an image's pixels in rows of ``pitch``: plain, and mirrored."""
    rows = torch.arange(height)[:, None] * pitch
    columns = torch.arange(width)
    both = torch.stack([(rows + columns).view(-1), (rows + columns.flip(0)).view(-1)])
    return _kept(both, device)


@functools.cache
def _reflected(height: int, width: int, padding: int, device: torch.device) -> Tensor:
    """``[(H + 2 padding) * (W + 2 padding)]``: the image's pixel that each of the padded one shows.

    Those outside are mirrored at the first and the last pixel, as by ``F.pad(mode="reflect")``.
    """

    def shown(size: int) -> Tensor:
        outside = torch.arange(-padding, size + padding)
        return (size - 1) - ((size - 1) - outside.abs()).abs()

    return _kept((shown(height)[:, None] * width + shown(width)).view(-1), device)


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
        mean, std = (_per_channel(each, images.device) for each in (self.mean, self.std))
        return images.float().sub_(mean).div_(std)

    def resize(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` images to ``size`` x ``size`` pixels, bilinear with antialiasing."""
        if images.shape[-1] == images.shape[-2] == self.size:
            return images
        side = (self.size, self.size)
        return F.interpolate(images, side, mode="bilinear", antialias=True, align_corners=False)


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """``[C, 1, 1]`` values in 0..255 of values in 0..1."""
    return _kept(torch.tensor(values).mul_(255).view(-1, 1, 1), device)


def _kept(constant: Tensor, device: torch.device) -> Tensor:
    """Send a constant to a device, to be kept there.

    Made at each step it would be copied from pageable memory, for which a GPU finishes all that it
    was given before.
    """
    with torch.inference_mode(False):  # the first one to ask may be a validation
        return constant.clone().to(device)
