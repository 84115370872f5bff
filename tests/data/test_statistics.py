"""Mean and standard deviation for normalisation."""

import numpy as np
import pytest

from cifar_dist.data.cache import prepare
from cifar_dist.data.datasets import find_source
from cifar_dist.data.statistics import ChannelStatistics


def test_agree_with_numpy() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 32, 32), np.uint8)
    images[:, 1] //= 3  # so that channels differ
    statistics = ChannelStatistics(channels=3)
    statistics.update(images)
    scaled = images / 255.0
    np.testing.assert_allclose(statistics.mean, scaled.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, scaled.std(axis=(0, 2, 3)), rtol=1e-12)
    assert statistics.pixels == 50 * 32 * 32


def test_do_not_depend_on_order_or_size_of_updates() -> None:
    images = np.random.default_rng(1).integers(0, 256, (30, 3, 8, 8), np.uint8)
    whole, parts = ChannelStatistics(), ChannelStatistics()
    whole.update(images)
    for part in (images[20:], images[:1], images[1:20]):
        parts.update(part)
    assert np.array_equal(whole.mean, parts.mean)
    assert np.array_equal(whole.std, parts.std)


def test_equal_pixels_have_no_deviation() -> None:
    statistics = ChannelStatistics(channels=1)
    statistics.update(np.full((4, 1, 8, 8), 51, np.uint8))
    assert statistics.mean == pytest.approx([0.2], rel=1e-12)
    assert statistics.std == pytest.approx([0.0], abs=1e-12)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 1, 8, 8), np.uint8), np.zeros((2, 3, 8, 8)), np.zeros((3, 8), np.uint8)]
)
def test_other_images_are_refused(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 \[n, 3, height, width\]"):
        ChannelStatistics().update(images)


def test_no_images_have_no_mean() -> None:
    with pytest.raises(ValueError, match="no image was counted"):
        _ = ChannelStatistics().mean


def test_of_real_images(real_cifar10) -> None:
    dataset = prepare("cifar10", find_source("cifar10", real_cifar10))
    images = dataset.open()[0].images
    for channel in range(3):
        pixels = images[:, channel].astype(np.float64) / 255
        assert dataset.mean[channel] == pytest.approx(pixels.mean(), rel=1e-9)
        assert dataset.std[channel] == pytest.approx(pixels.std(), rel=1e-9)
    # The archive's figures, known from many notebooks; JPEG moves them a little.
    np.testing.assert_allclose(dataset.mean, (0.4914, 0.4822, 0.4465), atol=2e-3)
    np.testing.assert_allclose(dataset.std, (0.2470, 0.2435, 0.2616), atol=5e-3)
