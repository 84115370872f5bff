"""The processes that this one has started, and theirs."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from pathlib import Path

PATIENCE_S = 500
"""How long tests wait for what must happen: minutes, on a machine that others keep busy."""
MARK = "CIFAR_DIST_TESTS"
"""Environment variable that processes which tests start inherit, and theirs, also those that leave
their parent's session or outlive it."""


def mark_own() -> str:
    """Mark the processes that this one will start; return the mark."""
    os.environ[MARK] = uuid.uuid4().hex
    return os.environ[MARK]


def marked(mark: str) -> dict[int, str]:
    """Return by process id the command lines of the processes that carry a mark, but this one."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is somebody else's
            command = (
                (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            )
            if wanted in (folder / "environ").read_bytes().split(b"\0") and command:
                found[int(folder.name)] = command.strip()
    found.pop(os.getpid(), None)
    # Python's own, which ends with the process that it is of.
    return {pid: each for pid, each in found.items() if "resource_tracker" not in each}


def end_marked(mark: str, wait_s: float = 20.0) -> dict[int, str]:
    """Wait for the marked processes to end by themselves, kill what is left, and return that."""
    until = time.monotonic() + wait_s
    while (left := marked(mark)) and time.monotonic() < until:
        time.sleep(0.2)
    for pid in left:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return left


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
