"""The directory of a new run or search, which appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import NoReturn

from cifar_dist.errors import UserError
from cifar_dist.storage import AnyPath, StorePath, at, delete_folder

_ASIDE = ".new-{}.tmp"
"""Names of folders that are not whole yet."""
_OLD_S = 3600


def new_folder(
    storage_path: str, name: str | None, stem: str, content: Mapping[str, bytes | None]
) -> AnyPath:
    """Make a new folder, named, or after a stem and the time; absolute.

    Args:
        storage_path: the folder that it is in; made where it is missing.
        name: its name, if it was given one.
        stem: what its name begins with otherwise.
        content: what it holds: files by name, None for an empty folder.

    Raises:
        UserError: the name is taken, or the folder cannot be made.
    """
    storage = at(storage_path)
    stem = f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        if isinstance(storage, StorePath):
            # Two commands of one second would both find the same name free.
            in_store = storage / (name or f"{stem}-{uuid.uuid4().hex[:6]}")
            if _made_in_store(in_store, content):
                return in_store
            _refuse(in_store, storage_path)
        storage.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(storage)
        for each in [name] if name else _numbered(stem):
            folder = storage / each
            if _made_on_disk(folder, content):
                return folder
        _refuse(folder, storage_path)
    except FileExistsError:
        raise _in_the_way(storage_path) from None
    except OSError as error:
        raise UserError(
            f"--storage-path {storage_path}: cannot be written ({error.strerror}); name another "
            "folder"
        ) from None


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    for number in count(2):
        yield f"{stem}-{number}"


def _refuse(folder: AnyPath, storage_path: str) -> NoReturn:
    if not folder.is_dir():
        raise _in_the_way(storage_path)
    if (folder / "config.yaml").is_file():
        raise UserError(
            f"--name {folder.name}: {folder} exists; resume it with --resume, or choose another "
            "--name"
        )
    raise UserError(
        f"--name {folder.name}: {folder} exists and holds no run; remove it, or choose another "
        "--name"
    )


def _in_the_way(storage_path: str) -> UserError:
    return UserError(f"--storage-path {storage_path}: a file of that name is in the way")


def _remove_leftovers(storage: Path) -> None:
    """Remove what commands left that were killed while they made a folder, an hour ago or more."""
    for aside in storage.glob(_ASIDE.format("*")):
        with contextlib.suppress(OSError):  # another command removes it
            if time.time() - aside.stat().st_mtime > _OLD_S:
                delete_folder(aside)


def _made_on_disk(folder: Path, content: Mapping[str, bytes | None]) -> bool:
    """Make a folder; return whether its name was free."""
    if os.path.lexists(folder):
        return False
    # Aside, and renamed: a kill in between would leave a name that can neither be resumed, for want
    # of a config, nor started anew.
    aside = folder.with_name(_ASIDE.format(uuid.uuid4().hex[:8]))
    try:
        aside.mkdir()
        for name, data in content.items():
            if data is None:
                (aside / name).mkdir()
            else:
                with (aside / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        try:
            # Of two commands that start together one fails here: a folder with files in it is not
            # replaced.
            aside.rename(folder)
        except OSError:
            if os.path.lexists(folder):
                return False
            raise
        return True
    finally:
        delete_folder(aside)


def _made_in_store(folder: StorePath, content: Mapping[str, bytes | None]) -> bool:
    """Write a folder's files, the config last; return whether its name was free.

    A folder that has some of them but no config was left by a kill in between, and is free.
    """
    files = {name: data for name, data in content.items() if data is not None}
    if {each.name for each in folder.iterdir()} - (content.keys() - {"config.yaml"}):
        return False
    if folder.is_file():
        return False
    for name in sorted(files, key="config.yaml".__eq__):
        (folder / name).write_bytes(files[name])
    return True
