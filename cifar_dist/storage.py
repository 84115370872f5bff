"""Paths of files on a disk or in an object store.

`StorePath` is for an object store what `pathlib.Path` is for a disk, with as much of the same
interface as a run's directory needs. pyarrow's file systems do the work, and are loaded when one is
asked for. Credentials are theirs to find, on each node anew: they are never part of a path.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import importlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cifar_dist.errors import RunFailed, StorageFailed, UserError, first_line

SCHEMES = ("s3", "gs")
"""Of the addresses that pyarrow's file systems know without further packages."""


class StoreError(OSError):
    """An object store does not answer, or refuses."""

    def __str__(self) -> str:
        return f"{self.filename}: cannot be reached ({self.strerror})"


@dataclass(frozen=True)
class StorePath:
    """A file or folder of an object store; what goes wrong there is an `OSError`."""

    scheme: str
    key: str
    """Bucket and path, without slashes at the ends."""
    query: str = ""
    """Options of its file system, e.g. ``endpoint_override=HOST:PORT&scheme=http``."""

    @classmethod
    def parse(cls, address: str) -> StorePath:
        """Return the path that an address like ``s3://bucket/folder`` names.

        Raises:
            UserError: it is none, or holds credentials.
        """
        parts = urlsplit(address)
        if parts.scheme not in SCHEMES:
            known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
            raise UserError(
                f"--storage-path {parts.scheme}://...: is no known kind of store; use {known} or "
                "a folder"
            )
        if "@" in parts.netloc or "secret" in parts.query:
            raise UserError(
                "--storage-path: holds credentials, which every file of the run would show; put "
                "them where the store's own tools look for them, e.g. AWS_ACCESS_KEY_ID"
            )
        return cls(parts.scheme, f"{parts.netloc}{parts.path}".strip("/"), parts.query)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}" + (f"?{self.query}" if self.query else "")

    def __truediv__(self, name: str) -> StorePath:
        return replace(self, key=f"{self.key}/{name}")

    @property
    def name(self) -> str:
        """The part after the last slash."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> StorePath:
        """The part before the last slash."""
        return replace(self, key=self.key.rpartition("/")[0])

    @property
    def filesystem(self) -> Any:
        """pyarrow's file system, which knows this path as ``key``."""
        return _filesystem(self.scheme, self.key.partition("/")[0], self.query)

    def with_name(self, name: str) -> StorePath:
        """Return its neighbour of another name."""
        return self.parent / name

    def exists(self) -> bool:
        """Return whether there is a file, or a folder with files."""
        return self._kind() != "NotFound"

    def is_file(self) -> bool:
        """Return whether it is a file."""
        return self._kind() == "File"

    def is_dir(self) -> bool:
        """Return whether it is a folder."""
        return self._kind() == "Directory"

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Make a folder; a store needs none, but it takes a name."""
        # A store has no folders that could collide: unchecked, a second run of a name would write
        # into the first one's.
        if not exist_ok and self.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))
        with self._errors():
            self.filesystem.create_dir(self.key, recursive=True)

    def iterdir(self) -> Iterator[StorePath]:
        """Return what is in a folder."""
        selector = importlib.import_module("pyarrow.fs").FileSelector
        with self._errors():
            found = self.filesystem.get_file_info(selector(self.key, allow_not_found=True))
        return (self / info.base_name for info in found)

    def glob(self, pattern: str) -> Iterator[StorePath]:
        """Return what is in a folder and has a name like this."""
        return (each for each in self.iterdir() if fnmatch.fnmatchcase(each.name, pattern))

    def read_bytes(self) -> bytes:
        """Read all of a file."""
        # Not as a stream, which asks for it in hundreds of small parts.
        with self._errors(), self.filesystem.open_input_file(self.key) as file:
            content: bytes = file.read()
            return content

    def read_text(self, encoding: str = "utf-8") -> str:
        """Read all of a text file."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        """Write a file; it is there whole or not at all."""
        with self._errors(), self.filesystem.open_output_stream(self.key) as file:
            file.write(content)

    def write_text(self, text: str) -> None:
        """Write a UTF-8 file."""
        self.write_bytes(text.encode())

    def rename(self, target: StorePath) -> StorePath:
        """Give a file another name."""
        with self._errors():
            self.filesystem.move(self.key, target.key)
        return target

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete a file."""
        if missing_ok and not self.is_file():
            return
        with self._errors():
            self.filesystem.delete_file(self.key)

    def delete_folder(self) -> None:
        """Delete a folder and all that is in it."""
        if self.is_dir():
            with self._errors():
                self.filesystem.delete_dir(self.key)

    def _kind(self) -> str:
        with self._errors():
            kind: str = self.filesystem.get_file_info(self.key).type.name
            return kind

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise pyarrow's errors as a file's."""
        try:
            yield
        # These mean to callers what they mean on a disk. All others become one kind of error with a
        # message of one line, which the command line turns into exit 2.
        except (FileNotFoundError, FileExistsError, PermissionError):
            raise
        except (OSError, ValueError) as error:
            raise StoreError(errno.EIO, first_line(error), str(self)) from None


# Once a process: each new file system looks for credentials and opens connections of its own.
@functools.cache
def _filesystem(scheme: str, bucket: str, query: str) -> Any:
    opened, _ = importlib.import_module("pyarrow.fs").FileSystem.from_uri(
        f"{scheme}://{bucket}" + (f"?{query}" if query else "")
    )
    return opened


AnyPath = Path | StorePath


def at(text: str | os.PathLike[str] | StorePath) -> AnyPath:
    """Return the path that a ``--storage-path`` or a file in it names; a disk's is absolute.

    Raises:
        UserError: an address of no known store.
    """
    if isinstance(text, StorePath):
        return text
    text = os.fspath(text).removeprefix("file://")
    if "://" in text:
        return StorePath.parse(text)
    return on_disk(text)


def on_disk(text: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a file or folder on a disk; ``~`` is the home directory.

    Raises:
        UserError: there is no home directory.
    """
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise UserError(
            f"{text}: there is no home directory; set HOME, or name it in full"
        ) from None


def user_cache(variable: str) -> Path:
    """Return the folder of the user's cached files, by ``$XDG_CACHE_HOME``, else in ``$HOME``.

    Args:
        variable: the environment variable that names another folder, for the message.

    Raises:
        UserError: there is no home directory.
    """
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # HOME is unset and the user has no entry in the system's list
        raise UserError(
            f"HOME is not set, so there is no folder for cached files; set {variable} to one"
        ) from None


def delete_folder(folder: AnyPath) -> None:
    """Delete a folder and all that is in it, as far as that goes."""
    if isinstance(folder, StorePath):
        with contextlib.suppress(OSError):
            folder.delete_folder()
    else:
        # Called in clean-ups, where an error would take the place of the one that is being raised.
        shutil.rmtree(folder, ignore_errors=True)


def is_writable(folder: AnyPath) -> bool:
    """Return whether files can be written there."""
    if isinstance(folder, Path):
        return os.access(folder, os.W_OK)
    # A store shows its permissions only to one who tries.
    probe = folder / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError:
        return False
    return True


def write_atomically(file: AnyPath, content: bytes) -> None:
    """Write a file so that it is there whole or not at all: on a disk aside, and renamed.

    Raises:
        StorageFailed: it cannot be written, e.g. to a full disk; what was there before is intact.
    """
    try:
        if isinstance(file, StorePath):
            # No name aside: a store shows an object when its upload has ended, and renames by
            # copying.
            file.write_bytes(content)
        else:
            write_aside(file, [content])
    except OSError as error:
        raise StorageFailed(
            f"{file}: cannot be written ({error.strerror}); {_advice(error)}"
        ) from None


def _advice(error: OSError) -> str:
    """Return what to do where a file cannot be written."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "its folder was removed or moved meanwhile; put it back"
    if error.errno == errno.EISDIR:
        return "a folder has its name; remove it, or name another file"
    saved = "what was saved before is intact"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{saved}; make its folder writable"
    if isinstance(error, StoreError):
        return f"{saved}; check the store and its credentials"
    return f"{saved}; make room for it"


def write_aside(file: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file of a disk from its parts, in order, so that it is there whole or not at all.

    Raises:
        OSError: it cannot be written; what was there before is intact.
    """
    # In the same folder, since a rename is atomic only within a file system; and with a name of its
    # own, since two processes may write the same file.
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with aside.open("wb") as out:
            for part in parts:
                out.write(part)
            out.flush()
            # Else a machine that loses power may keep the new name and lose the bytes.
            os.fsync(out.fileno())
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


_OF_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
"""What the system says of a disk that is full, over a quota, read-only, broken or gone; an object
store that does not answer counts as broken."""


def storage_failure(error: BaseException) -> StorageFailed | None:
    """Return what an exception says of the machine's storage; None where that is not its cause."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, StorageFailed):
            return seen
        if isinstance(seen, OSError) and seen.errno in _OF_STORAGE:
            # A library's file has no name, or a command's own error says more.
            said = error if isinstance(error, RunFailed | UserError) else seen
            full = seen.errno in (errno.ENOSPC, errno.EDQUOT)
            return StorageFailed(first_line(said) + "; make room for it" * full)
        seen = seen.__cause__ or seen.__context__
    return None


def as_json(values: Mapping[str, Any]) -> bytes:
    """Return the text of a JSON file."""
    return (json.dumps(values, indent=2) + "\n").encode()
