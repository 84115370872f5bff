"""Which image at which step on which rank: pure functions of (seed, epoch, step)."""

import functools

import numpy as np
from numpy.typing import NDArray

from cifar_dist.data.philox import Stream, philox4x32, random_words

ORDER_VERSION = 2
"""Raise it when `epoch_order` or the draws of `transforms` change. A checkpoint carries the version
that it was trained with: one from the middle of an epoch is of no use under another order. 1 is
cifar_dist 0.1.0, whose checkpoints do not say so."""


@functools.lru_cache(maxsize=8)  # several times in a run, 20 ms each for 50,000 images
def split(images: int, held_out: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split images into the numbers of those kept and of ``held_out`` others, sorted.

    The split is the same for every ``--seed``, so that runs and trials with different seeds are
    judged on the same images, and for every version, see `philox4x32`. The images are sorted by 64
    random bits each.
    """
    counter = np.zeros((images, 4), np.uint32)
    counter[:, 0] = np.arange(images)
    counter[:, 2] = int(Stream.SPLIT)
    words = philox4x32(counter, (0, 0)).astype(np.uint64)
    # A stable sort: equal words, however unlikely, keep the images' order in any version of NumPy.
    order = np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")
    kept, others = np.sort(order[held_out:]), np.sort(order[:held_out])
    for each in (kept, others):  # one array for all callers
        each.flags.writeable = False
    return kept, others


def epoch_order(images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order in which epoch ``epoch`` (0-based) goes through ``images`` images.

    They are sorted by 64 random bits each. Unlike a library's ``permutation``, this cannot change
    with the library's version.
    """
    words = random_words(seed, Stream.ORDER, epoch, images, words=1)
    return np.argsort(words[:, 0], kind="stable")


def batch_bounds(images: int, batch_size: int) -> NDArray[np.int64]:
    """Return where the global batches of an epoch begin and end.

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
    """Return the contiguous part of a global batch of ``images`` images that a rank takes.

    The parts of all ranks make up the batch, in order; their sizes differ by at most one.
    """
    # In whole numbers: the end of a rank's part is the start of the next, where rounding a share
    # could lose or repeat an image.
    return slice(images * rank // world_size, images * (rank + 1) // world_size)
