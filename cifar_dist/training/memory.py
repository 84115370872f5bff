"""Keeping memory that a training step has freed for the next step."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""Bytes; glibc takes no more."""
LARGEST_TRIM_THRESHOLD = 2**31 - 1


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have malloc keep what is freed for as long as this lasts, and give it back then.

    Each step on the CPU allocates its activations anew. By itself glibc gives them back to the
    kernel after each step and takes them again, page by page, which may cost a tenth of the step.
    Where the C library is another, nothing happens.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    # Both are needed: blocks above the first are mapped and unmapped one by one, and free memory
    # above the second is given back. Setting either ends glibc's own adjustment of the two.
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, LARGEST_TRIM_THRESHOLD)
    try:
        yield
    finally:
        # The thresholds stay: glibc has no call that returns the values they had before.
        libc.malloc_trim(0)


def threads_share_memory() -> None:
    """Have threads that start after this allocate where the main thread does.

    The places that glibc would give them are small, and not covered by `freed_memory_kept`.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(M_ARENA_MAX, 1)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
