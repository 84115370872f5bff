"""Commands to type next, paths formatted for display, and messages."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import TextIO

from cifar_dist.config.train import TrainConfig
from cifar_dist.events import Event, Waiting, Warned
from cifar_dist.storage import AnyPath


def resume_command(command: str, name: str, storage_path: str, *flags: str) -> str:
    """Return what to type to resume a run or a search."""
    words = [*command.split(), "--name", name, "--resume"]
    if storage_path != TrainConfig.storage_path:
        words += ["--storage-path", storage_path]
    # Quoted, since it is to be pasted into a shell and folders' names may hold spaces.
    return shlex.join([*words, *flags])


def shown(path: AnyPath) -> AnyPath:
    """Return a path formatted for display: relative where it is in the current folder."""
    if isinstance(path, Path) and path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd())
    return path


def files_in(folder: AnyPath) -> str:
    """Return the names in a folder, for a line of output."""
    return " ".join(sorted(f"{p.name}/" if p.is_dir() else p.name for p in folder.iterdir()))


def in_one_line(name: str) -> str:
    """Return a file's name with its control characters, line ends among them, escaped."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in name)


def put(stream: TextIO, text: str) -> None:
    """Write to a terminal, file or pipe at once; nothing where that cannot be written."""
    # A run outlives its display: a terminal that was closed, a pipe that nobody reads any more.
    with contextlib.suppress(OSError):
        stream.write(text)
        # Into a pipe or a file Python writes in blocks: an epoch would show minutes late.
        stream.flush()


def message_to_stderr(event: Event) -> None:
    """Write the message of a warning, or of a wait for the cluster, to standard error."""
    if isinstance(event, Warned | Waiting):
        put(sys.stderr, f"{event.message}\n")
