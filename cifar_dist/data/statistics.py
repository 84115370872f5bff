"""Mean and standard deviation of images, for normalisation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class ChannelStatistics:
    """Mean and standard deviation of each channel over all pixels of many images.

    Counts of the 256 pixel values are kept, so the result is exact: it does not depend on
    the order or the size of the updates, and no squares of large sums are subtracted.

    Example:
        >>> statistics = ChannelStatistics(channels=3)
        >>> statistics.update(images)  # as often as there are batches
        >>> statistics.mean, statistics.std
    """

    def __init__(self, channels: int = 3) -> None:
        self.counts: NDArray[np.int64] = np.zeros((channels, 256), np.int64)

    def update(self, images: NDArray[np.uint8]) -> None:
        """Count the pixels of ``[n, channels, height, width]`` images with values 0 to 255.

        Raises:
            ValueError: the images have another type, shape or number of channels.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != len(self.counts):
            raise ValueError(
                f"images must be uint8 [n, {len(self.counts)}, height, width], "
                f"not {images.dtype} {list(images.shape)}"
            )
        # One channel at a time, since bincount first makes 8-byte integers of all bytes it is
        # given.
        for channel, counts in enumerate(self.counts):
            counts += np.bincount(images[:, channel].ravel(), minlength=256)

    @property
    def pixels(self) -> int:
        """Pixels counted, per channel."""
        return int(self.counts[0].sum())

    @property
    def mean(self) -> NDArray[np.float64]:
        """Return ``[channels]`` means, with pixel values scaled to 0..1.

        Raises:
            ValueError: no image was counted yet.
        """
        return self._mean_of(np.arange(256) / 255.0)

    @property
    def std(self) -> NDArray[np.float64]:
        """Return ``[channels]`` standard deviations (of the population), scaled likewise.

        Raises:
            ValueError: no image was counted yet.
        """
        deviations = np.arange(256) / 255.0 - self.mean[:, None]
        return np.sqrt(self._mean_of(deviations**2))

    def _mean_of(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        if not self.pixels:
            raise ValueError("no image was counted yet: call update() first")
        total: NDArray[np.float64] = (self.counts * values).sum(axis=1)
        return total / self.pixels
