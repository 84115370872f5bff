"""Counter-based random numbers: each is a pure function of a key and a counter.

A generator with a history gives an image other numbers when the number of workers changes or
a run starts in the middle of an epoch. Here the key is (seed, stream, epoch) and the counter is the
image, so an image gets the same numbers in any batch on any worker.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class Stream(IntEnum):
    """Purposes of random numbers; the same counter in two streams gives unrelated numbers."""

    ORDER = 0
    AUGMENTATION = 1  # of --augment: a run has one, so they share the stream
    CUTOUT = 2
    SPLIT = 3


def random_words(
    seed: int, stream: Stream, epoch: int, images: int, words: int = 4
) -> NDArray[np.uint64]:
    """Return random 64-bit words for every image of a data set.

    They are the raw output of `numpy.random.Philox` (Philox4x64-10), whose stream NumPy guarantees
    not to change.

    Args:
        seed: the run's seed, below 2**64.
        stream: what the words are for.
        epoch: 0-based epoch, below 2**32.
        images: number of images in the data set.
        words: words for each image.

    Returns:
        ``[images, words]``; row i depends on (seed, stream, epoch, i) alone, not on ``images``.
    """
    # A key for each epoch and purpose: no two of them can come to share a part of one stream.
    key = np.array([seed, int(stream) << 32 | epoch], np.uint64)
    # Not a Generator's integers or permutation: NumPy may change what those make of the stream.
    raw: NDArray[np.uint64] = np.random.Philox(key=key).random_raw(images * words)
    return raw.reshape(images, words)


def below(words: NDArray[np.uint64], bound: int) -> NDArray[np.int64]:
    """Map words to whole numbers from 0 to ``bound`` - 1, by multiplication (Lemire 2019).

    Args:
        words: uniform 64-bit words, of which the upper halves are used.
        bound: at most 2**32.
    """
    # The upper halves alone: a whole word times the bound would overflow 64 bits.
    return ((words >> _HALF) * np.uint64(bound) >> _HALF).astype(np.int64)


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Return Philox4x32-10 of many counters at once, from which version 0.1.0 drew all its numbers.

    Kept for the split into training and validation images alone: with another split a run that
    0.1.0 started would, resumed, train on the images that it is validated on.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
        counter: ``[n, 4]`` 32-bit words.
        key: two 32-bit words.

    Returns:
        ``[n, 4]`` 32-bit words, uniform and independent for different counters or keys.
    """
    c0, c1, c2, c3 = (np.ascontiguousarray(word).astype(np.uint64) for word in counter.T)
    k0, k1 = key
    for _ in range(ROUNDS):
        # In 64 bits: the rounds use the upper halves of these products, which uint32 would drop.
        product0, product1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL_0) & 0xFFFFFFFF, (k1 + _WEYL_1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)
