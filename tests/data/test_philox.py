"""Counter-based random numbers."""

import numpy as np
import pytest

from cifar_dist.data.philox import Stream, below, philox4x32, random_words


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # The known answers that come with Random123 (kat_vectors, philox4x32, 10 rounds).
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            (0xFFFFFFFF, 0xFFFFFFFF),
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    words = philox4x32(np.array([counter, counter], np.uint32), key)
    assert words.tolist() == [expected, expected]


def test_words_are_numpys_philox_by_image() -> None:
    raw = np.random.Philox(key=np.array([7, (1 << 32) + 3], np.uint64)).random_raw(400)
    words = random_words(7, Stream.AUGMENTATION, 3, 100)
    assert words[42].tolist() == raw[168:172].tolist()


def test_words_depend_on_the_image_not_on_how_many_there_are() -> None:
    few, many = (random_words(7, Stream.AUGMENTATION, 3, count) for count in (50, 90_000))
    assert np.array_equal(few, many[:50])


def test_seed_stream_epoch_and_image_each_matter() -> None:
    base = random_words(1, Stream.AUGMENTATION, 0, 50)
    for other in (
        random_words(2, Stream.AUGMENTATION, 0, 50),
        random_words(1 + 2**32, Stream.AUGMENTATION, 0, 50),
        random_words(1, Stream.CUTOUT, 0, 50),
        random_words(1, Stream.AUGMENTATION, 1, 50),
        random_words(1, Stream.AUGMENTATION, 0, 100)[50:],
    ):
        assert (other != base).mean() > 0.99


def test_below_is_uniform_and_in_range() -> None:
    words = random_words(0, Stream.AUGMENTATION, 0, 90_000)[:, 0]
    counts = np.bincount(below(words, 9), minlength=9)
    assert len(counts) == 9
    # Chi-squared with 8 degrees of freedom: 26.1 is passed by 999 of 1,000 fair draws.
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 26.1


def test_below_maps_the_least_and_the_greatest_word_to_the_ends() -> None:
    ends = np.array([0, 2**64 - 1], np.uint64)
    assert below(ends, 9).tolist() == [0, 8]
    assert below(ends, 1).tolist() == [0, 0]
