"""The processes that this one has started, and theirs."""

from __future__ import annotations

import os
from pathlib import Path


def descendants(of: int | None = None) -> dict[int, str]:
    """By process id: what every process that this one, or ``of``, has started is called."""
    titles: dict[int, str] = {}
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rsplit(")")[-1].split()[1]
            )
        except OSError:
            continue  # it ended meanwhile
    found = {of or os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: titles[pid] for pid in found if pid in titles}
