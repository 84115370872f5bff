"""Transforms of a batch of images: crop, flip, cutout, normalise, resize. CPU or GPU.

Shapes: B images, C channels, H and W height and width.

Random numbers are drawn on the CPU, as a pure function of (seed, epoch, image); they are applied
where the images are, on the whole batch at once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.philox import Stream, below, random_words


class Augmentation:
    """Random changes to training images; this one makes none.

    Another one is a subclass, and a line in `cifar_dist.registry.AUGMENTATIONS` that names a
    function, or the class itself, which makes it from a `TrainConfig`.
    """

    @property
    def columns(self) -> int:
        """Whole numbers that are drawn for each image."""
        return 0

    def draw(self, seed: int, epoch: int, images: int, side: int) -> NDArray[np.int64]:
        """Draw for every image of a data set, once an epoch, on the CPU.

        Args:
            seed: the run's.
            epoch: 0-based.
            images: number of images in the data set.
            side: an image's height and width in pixels.

        Returns:
            ``[columns, images]``; what an image gets depends on (seed, epoch, image) alone.
        """
        return np.empty((0, images), np.int64)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change ``[B, C, H, W]`` images by the ``[columns, B]`` draws, where both are."""
        return images


@dataclass(frozen=True)
class CropAndFlip(Augmentation):
    """Random crop out of the padded image, and horizontal flip."""

    padding: int
    """Pixels of padding on each side before the crop."""
    flip: float
    """Probability of a horizontal flip."""
    padding_mode: str = "constant"
    """Content of the padding, in torchvision's terms: ``constant`` (zeros) or ``reflect`` (the
    image mirrored at its edge, whose pixels are not repeated)."""

    @property
    def columns(self) -> int:
        """First row and column of the crop in the padded image, and 1 for mirrored, else 0."""
        return 3

    def draw(self, seed: int, epoch: int, images: int, side: int) -> NDArray[np.int64]:
        words = random_words(seed, Stream.AUGMENTATION, epoch, images)
        drawn = np.zeros((self.columns, images), np.int64)
        drawn[0] = below(words[:, 0], 2 * self.padding + 1)
        drawn[1] = below(words[:, 1], 2 * self.padding + 1)
        # Compared as numbers below 2**64, so that probabilities 0 and 1 mean never and always.
        drawn[2] = words[:, 2].astype(np.float64) < self.flip * 2.0**64 if self.flip < 1 else 1
        return drawn

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Crop and flip images of any type; one gather for the whole batch."""
        if self.padding == 0 and self.flip == 0:
            return images
        top, left, flip = draws.unbind()
        count, channels, height, width = images.shape
        pitch = width + 2 * self.padding
        # Pixel numbers in the padded image: of the window at its corner, moved to the crop.
        corner = top * pitch + left
        pixels = _windows(height, width, pitch, images.device).index_select(0, flip)
        pixels = pixels + corner[:, None]
        if self.padding_mode == "reflect":
            # By index, for bytes on any device, and without a padded copy.
            pixels = _reflected(height, width, self.padding, images.device)[pixels]
        else:
            images = F.pad(images, (self.padding,) * 4)
        pixels = pixels.view(count, 1, -1).expand(-1, channels, -1)
        gathered = images.reshape(count, channels, -1).gather(2, pixels)
        return gathered.view(count, channels, height, width)


@dataclass(frozen=True)
class Cutout(Augmentation):
    """A blank square in each normalised image, after any other augmentation."""

    side: int
    """Of the square in pixels, 0 for none (DeVries and Taylor 2017)."""

    @property
    def columns(self) -> int:
        """Row and column of the middle of the blanked square."""
        return 2 if self.side else 0

    def draw(self, seed: int, epoch: int, images: int, side: int) -> NDArray[np.int64]:
        if not self.side:
            return super().draw(seed, epoch, images, side)
        # A stream of its own: with and without cutout a run crops and flips its images alike.
        return below(random_words(seed, Stream.CUTOUT, epoch, images, words=2), side).T

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Set a square of each image to 0, the mean colour.

        A square that reaches over the image's edge is cut off there, as in the paper.
        """
        if self.side == 0:
            return images
        half = self.side // 2

        def outside(middle: Tensor, size: int) -> Tensor:
            offset = torch.arange(size, device=images.device) - middle[:, None] + half
            return (offset < 0) | (offset >= self.side)

        rows = outside(draws[0], images.shape[2])
        columns = outside(draws[1], images.shape[3])
        return images * (rows[:, None, :, None] | columns[:, None, None, :])


def crop_flip(config: TrainConfig) -> Augmentation:
    """Return ``--augment crop-flip``: pad, crop at random, flip."""
    assert config.flip is not None  # filled in when the config was made
    return CropAndFlip(config.crop_padding, config.flip, config.crop_padding_mode)


def no_augmentation(config: TrainConfig) -> Augmentation:
    """Return ``--augment none``."""
    return Augmentation()


@functools.cache
def _windows(height: int, width: int, pitch: int, device: torch.device) -> Tensor:
    """Return ``[2, H * W]`` numbers of an image's pixels in rows of ``pitch``: plain, mirrored."""
    rows = torch.arange(height)[:, None] * pitch
    columns = torch.arange(width)
    both = torch.stack([(rows + columns).view(-1), (rows + columns.flip(0)).view(-1)])
    return _kept(both, device)


@functools.cache
def _reflected(height: int, width: int, padding: int, device: torch.device) -> Tensor:
    """Return ``[(H + 2 padding) * (W + 2 padding)]`` numbers: the pixel that each padded one shows.

    Those outside are mirrored at the first and the last pixel, as by ``F.pad(mode="reflect")``.
    """

    def shown(size: int) -> Tensor:
        outside = torch.arange(-padding, size + padding)
        return (size - 1) - ((size - 1) - outside.abs()).abs()

    return _kept((shown(height)[:, None] * width + shown(width)).view(-1), device)


@dataclass(frozen=True)
class Normalisation:
    """Scaling of bytes to numbers around 0, and of images to the network's side."""

    mean: tuple[float, ...]
    """Of each channel, with pixel values scaled to 0..1."""
    std: tuple[float, ...]
    """Of each channel, likewise."""
    size: int
    """Side of the result in pixels."""

    def apply(self, images: Tensor) -> Tensor:
        """Turn ``[B, C, H, W]`` bytes into float32 ``(pixel / 255 - mean) / std``."""
        mean, std = (_per_channel(each, images.device) for each in (self.mean, self.std))
        # ``float`` copies bytes, so the operations in place change nothing in the data set.
        return images.float().sub_(mean).div_(std)

    def resize(self, images: Tensor) -> Tensor:
        """Resize ``[B, C, H, W]`` images to ``size`` x ``size``, bilinear with antialiasing."""
        if images.shape[-1] == images.shape[-2] == self.size:
            return images
        side = (self.size, self.size)
        # Without antialiasing a reduced image would show some of its pixels and skip the others.
        return F.interpolate(images, side, mode="bilinear", antialias=True, align_corners=False)


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return ``[C, 1, 1]`` values in 0..255 for values in 0..1."""
    # Two small constants are scaled here, so that no batch is divided by 255.
    return _kept(torch.tensor(values).mul_(255).view(-1, 1, 1), device)


def _kept(constant: Tensor, device: torch.device) -> Tensor:
    """Send a constant to a device, to be kept there.

    Made at each step it would be copied from pageable memory, for which a GPU first finishes all
    the work that it was given.
    """
    with torch.inference_mode(False):  # the first one to ask may be a validation
        return constant.clone().to(device)
