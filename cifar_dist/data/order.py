"""Which image at which step on which rank: pure functions of (seed, epoch, step)."""

import numpy as np
from numpy.typing import NDArray

from cifar_dist.data.philox import Stream, random_words

SPLIT_SEED = 0
"""The split into training and validation images is the same for every ``--seed``, so that
runs and trials with different seeds are judged on the same images."""


def _shuffled(images: int, seed: int, stream: Stream, epoch: int) -> NDArray[np.int64]:
    """A random order of ``images`` images: they are sorted by 64 random bits each.

    Unlike a library's ``permutation``, this cannot change with the library's version.
    """
    words = random_words(seed, stream, epoch, np.arange(images)).astype(np.uint64)
    return np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")


def split(images: int, held_out: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A fixed random split into the numbers of kept images and of ``held_out`` others, sorted."""
    order = _shuffled(images, SPLIT_SEED, Stream.SPLIT, 0)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def epoch_order(images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which epoch ``epoch`` (0-based) goes through ``images`` images."""
    return _shuffled(images, seed, Stream.ORDER, epoch)


def batch_bounds(images: int, batch_size: int) -> NDArray[np.int64]:
    """Where the global batches of an epoch begin and end.

    An epoch shows every image once, in ``ceil(images / batch_size)`` steps. All batches are
    full but the last; where that one would hold less than half a batch, it shares evenly with
    the one before it, so that no update rests on a handful of images.

    Returns:
        ``[steps + 1]`` positions in the epoch's order; step ``s`` is ``bounds[s]:bounds[s + 1]``.
    """
    steps = -(-images // batch_size)
    bounds = np.minimum(np.arange(steps + 1) * batch_size, images)
    if steps > 1 and images - bounds[-2] < batch_size / 2:
        bounds[-2] = (bounds[-3] + images) // 2
    return bounds


def rank_slice(images: int, rank: int, world_size: int) -> slice:
    """The contiguous part of a global batch of ``images`` images that a rank takes.

    The parts of all ranks make up the batch, in order; their sizes differ by at most one.
    """
    return slice(images * rank // world_size, images * (rank + 1) // world_size)
