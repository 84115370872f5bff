"""The file of a decoded data set: safetensors, with a digest over all that it holds.

Written and read by hand, in few lines: the safetensors library maps for torch only, which the
driver does not load, and neither syncs what it writes nor checks what it reads.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_dist.storage import write_aside

_TYPES: dict[str, type[np.integer[Any]]] = {"U8": np.uint8, "I16": np.int16, "I32": np.int32}
"""Of the arrays, by safetensors' names, the narrowest first. Images are uint8."""
_NO_DIGEST = "0" * 64
"""Stands in the header for the digest while that is computed."""


def label_type(classes: int) -> type[np.integer[Any]]:
    """Return the narrowest type of a cached file that holds the numbers of so many classes."""
    return next(each for each in _TYPES.values() if classes - 1 <= np.iinfo(each).max)


def write(path: Path, about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a data set, so that it is there whole or not at all, a power cut included.

    Raises:
        OSError: it cannot be written.
    """
    names = {kind: name for name, kind in _TYPES.items()}
    # The widest values first: each array then begins at a multiple of its values' size.
    ordered = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))
    entries: dict[str, Any] = {
        "__metadata__": {"about": json.dumps(about), "digest": _NO_DIGEST},
    }
    end = 0
    for name, array in ordered.items():
        begin, end = end, end + array.nbytes
        entries[name] = {
            "dtype": names[array.dtype.type],
            "shape": array.shape,
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    found = hashlib.sha256(header)
    parts = [np.ascontiguousarray(array).data for array in ordered.values()]
    for part in parts:
        found.update(part)
    # The last: a class may be called so, too, but its name comes before.
    head, _, tail = header.rpartition(_NO_DIGEST.encode())
    signed = head + found.hexdigest().encode() + tail
    write_aside(path, [len(header).to_bytes(8, "little"), signed, *parts])


def read_about(path: Path) -> dict[str, Any]:
    """Return what `write` was given beside the arrays."""
    found: dict[str, Any] = json.loads(_header(path)[0]["__metadata__"]["about"])
    return found


def is_intact(path: Path) -> bool:
    """Return whether a file is what was written: to the last byte, by its digest.

    Raises:
        OSError: it cannot be read, for another reason than a damaged disk.
    """
    try:
        entries, start = _header(path)
        digest = entries["__metadata__"]["digest"].encode()
        with path.open("rb") as file:
            file.seek(8)
            found = hashlib.sha256(file.read(start - 8).replace(digest, _NO_DIGEST.encode()))
            # Read, not mapped: where a mapped block cannot be read, the process is killed.
            hashlib.file_digest(file, lambda: found)
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return False
    return bool(found.hexdigest().encode() == digest)


def mapped(path: Path) -> dict[str, NDArray[Any]]:
    """Return every array of a file, mapped copy-on-write."""
    entries, start = _header(path)
    return {
        name: np.memmap(
            path,
            _TYPES[entry["dtype"]],
            # Not "r": torch warns of arrays that cannot be written. The file never changes.
            "c",
            offset=start + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a safetensors file's header, and the position of the first byte after it.

    Raises:
        ValueError: there is none.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        # Not read where it is damage that gives the size, which may exceed the memory.
        if not 0 < size <= path.stat().st_size:
            raise ValueError("the header's size is no size")
        found: dict[str, Any] = json.loads(file.read(size))
        return found, 8 + size
