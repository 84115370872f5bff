"""What to type next, and paths as the person at the terminal would write them."""

from __future__ import annotations

import shlex
from pathlib import Path

from cifar_dist.config.train import TrainConfig
from cifar_dist.storage import AnyPath


def resume_command(command: str, name: str, storage_path: str, *flags: str) -> str:
    """What to type to go on with a run or a search."""
    words = [*command.split(), "--name", name, "--resume"]
    if storage_path != TrainConfig.storage_path:
        words += ["--storage-path", storage_path]
    return shlex.join([*words, *flags])


def shown(path: AnyPath) -> AnyPath:
    """A path as a person standing here would write it."""
    if isinstance(path, Path) and path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd())
    return path


def files_in(folder: AnyPath) -> str:
    """The names in a folder, for a line of output."""
    return " ".join(sorted(f"{p.name}/" if p.is_dir() else p.name for p in folder.iterdir()))
