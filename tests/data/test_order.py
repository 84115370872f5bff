"""Which image at which step on which rank."""

import hashlib

import numpy as np
import pytest

from cifar_dist.data.order import ORDER_VERSION, batch_bounds, epoch_order, rank_slice, split

GOLDEN_ORDER = "c3ffb4055e8176ec60e6d2ba2ab78608c497848f2143fee50e6dde9b510741ea"
GOLDEN_SPLIT = "a9f69e6853d820e604df4495f9764257e6359bef637d005c0f3087f9725f0a66"


def test_an_epoch_goes_through_every_image_once() -> None:
    assert np.array_equal(np.sort(epoch_order(1000, seed=3, epoch=5)), np.arange(1000))


def test_the_order_changes_with_seed_and_epoch_only() -> None:
    base = epoch_order(1000, seed=3, epoch=5)
    assert np.array_equal(base, epoch_order(1000, seed=3, epoch=5))
    assert (base != epoch_order(1000, seed=3, epoch=6)).mean() > 0.9
    assert (base != epoch_order(1000, seed=4, epoch=5)).mean() > 0.9


def test_the_order_is_that_of_its_version() -> None:
    # A run that was started with one release must resume with the next to the same bits; where this
    # changes, ORDER_VERSION must.
    assert ORDER_VERSION == 2
    digest = hashlib.sha256(epoch_order(45_000, seed=0, epoch=1).astype("<i8").tobytes())
    assert digest.hexdigest() == GOLDEN_ORDER


def test_the_split_is_that_of_the_first_release_and_complete() -> None:
    kept, held_out = split(50_000, held_out=5_000)
    assert (len(kept), len(held_out)) == (45_000, 5_000)
    assert np.array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(50_000))
    digest = hashlib.sha256(held_out.astype("<i8").tobytes())
    assert digest.hexdigest() == GOLDEN_SPLIT


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"),
    [
        (256, 128, [128, 128]),
        (300, 128, [128, 86, 86]),  # 44 are less than half a batch: shared with the one before
        (330, 128, [128, 128, 74]),
        (257, 128, [128, 64, 65]),
        (100, 128, [100]),
        (1, 128, [1]),
    ],
)
def test_batches_are_full_but_the_last(images: int, batch_size: int, sizes: list[int]) -> None:
    assert np.diff(batch_bounds(images, batch_size)).tolist() == sizes


@pytest.mark.parametrize("images", range(1, 400, 7))
@pytest.mark.parametrize("batch_size", [2, 32, 33, 128])
def test_no_batch_is_small_and_none_too_large(images: int, batch_size: int) -> None:
    sizes = np.diff(batch_bounds(images, batch_size))
    assert sizes.sum() == images
    assert len(sizes) == -(-images // batch_size)
    assert sizes.max() <= batch_size
    assert sizes.min() >= min(images, batch_size / 2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("images", [1, 5, 128, 130])
def test_ranks_parts_make_up_the_batch_in_order(images: int, world_size: int) -> None:
    parts = [np.arange(images)[rank_slice(images, r, world_size)] for r in range(world_size)]
    assert np.array_equal(np.concatenate(parts), np.arange(images))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
