"""Counter-based random numbers: each is a pure function of a key and a counter.

A generator with a history gives an image other numbers when the number of workers changes or
a run starts in the middle of an epoch. A counter-based one gives the same ones always: the
counter here is (image, epoch, stream), the key is the seed.
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
    """What random numbers are for; the same counter in two streams gives unrelated numbers."""

    ORDER = 0
    CROP_AND_FLIP = 1
    CUTOUT = 2
    SPLIT = 3


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10 of many counters at once.

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
        product0, product1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL_0) & 0xFFFFFFFF, (k1 + _WEYL_1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def random_words(
    seed: int, stream: Stream, epoch: int, images: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """Four random 32-bit words for each image.

    Args:
        seed: the run's seed, below 2**64.
        stream: what the words are for.
        epoch: 0-based epoch, below 2**32.
        images: ``[n]`` numbers of images, each below 2**32.

    Returns:
        ``[n, 4]`` words that depend on (seed, stream, epoch, image) alone.
    """
    counter = np.zeros((len(images), 4), np.uint32)
    counter[:, 0] = images
    counter[:, 1] = epoch
    counter[:, 2] = int(stream)
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))


def below(words: NDArray[np.uint32], bound: int) -> NDArray[np.int64]:
    """The words as whole numbers from 0 to ``bound`` - 1, by multiplication (Lemire 2019)."""
    return ((words.astype(np.uint64) * np.uint64(bound)) >> _HALF).astype(np.int64)
