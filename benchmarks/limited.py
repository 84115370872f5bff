"""A command under a time limit that leaves no process behind.

``python -m benchmarks.limited SECONDS COMMAND ...`` runs the command in a process group of its own
and exits with its code, or with 124 if it was killed at its limit. Whatever the command has started
is killed when it ends, its daemons too: this process adopts orphans, so that all of them stay its
descendants. If the process that started this one dies, so does everything. Needs Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

OVER_LIMIT = 124
"""Exit code of a command that was killed at its limit, as timeout(1) has it."""
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def limited(words: Sequence[str], seconds: float) -> int:
    """Run a command for at most so many seconds and return its exit code.

    The calling process must have no other children: all its descendants are killed.

    Args:
        words: the command.
        seconds: wall-clock limit.

    Returns:
        The command's exit code (128 + n if signal n ended it), or `OVER_LIMIT`.
    """
    _adopt_orphans()
    started = subprocess.Popen(words, start_new_session=True)
    try:
        code = started.wait(seconds)
        return code if code >= 0 else 128 - code
    except subprocess.TimeoutExpired:
        return OVER_LIMIT
    finally:
        _kill_descendants()


def _adopt_orphans() -> None:
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((PR_SET_CHILD_SUBREAPER, 1), (PR_SET_PDEATHSIG, signal.SIGTERM)):
        if libc.prctl(option, value, 0, 0, 0):
            raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
    if os.getppid() != parent:  # it died before the kernel was asked to report that
        sys.exit(1)


def _kill_descendants() -> None:
    # More than one round: a process may fork between the listing and its end.
    while found := _descendants():
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def _descendants() -> set[int]:
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            after_name = (folder / "stat").read_text().rsplit(")", 1)[-1].split()
            parents[int(folder.name)] = int(after_name[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> None:
    """Run the command that is named, and leave with its exit code."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stop)  # an exit, so that what was started is killed first
    sys.exit(limited(sys.argv[2:], float(sys.argv[1])))


if __name__ == "__main__":
    main()
