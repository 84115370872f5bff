"""The lock of a run's or a search's directory: one command at a time writes into it.

Each command writes a file of its own there, every few seconds anew, and looks for files of others
once its own is there. So of two commands that start together at least one sees the other, and no
file has to be created exclusively, which pyarrow's object stores cannot do. A file is only ever
written by its owner: a command that takes over deletes that of a dead one, and cannot delete that
of a third one that was faster.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cifar_dist.errors import RunFailed, UserError
from cifar_dist.events import Listener, Waiting, Warned
from cifar_dist.storage import AnyPath, as_json, write_atomically

HEARTBEAT_S = 5
SILENT_S = 60
"""How long a command on another machine must be silent to count as dead."""
TRIES = 3
"""How often two commands that start together give way to each other before both are refused."""
TAKE_OVER = "CIFAR_DIST_TAKE_OVER"
"""The environment variable with which a command takes over from any other at once."""


@dataclass(frozen=True)
class Holder:
    """A command that works in a directory."""

    host: str
    machine: str
    """Distinguishes machines and containers of one host name, as far as the system tells."""
    pid: int
    started: str
    """When the process started: another one may have its number by now."""
    heartbeat: float = 0.0
    """Seconds since the epoch, by the clock of its machine."""
    token: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    @classmethod
    def here(cls) -> Holder:
        """Return this process."""
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _started(pid) or "")

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lock:
    """This command's hold on a directory, kept by a thread until it is released.

    Args:
        folder: the directory.
    """

    def __init__(self, folder: AnyPath) -> None:
        self._folder = folder
        self._holder = Holder.here()
        self._released = threading.Event()
        self._lost = False
        self._in_main = threading.current_thread() is threading.main_thread()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def take(self, listener: Listener) -> None:
        """Take the directory, over from dead commands too; notify the listener of those.

        Raises:
            UserError: another command works in it.
            StorageFailed: it cannot be written.
        """
        for attempt in range(TRIES):
            self._write()
            found = _holders(self._folder)
            holder = next(
                (each for each in found if each.token != self._holder.token
                 and not self._taken_over(each, listener)), None,
            )  # fmt: skip
            if holder is None:
                self._beating.start()
                return
            _delete(self._file(self._holder))
            if attempt + 1 < TRIES:
                time.sleep(random.uniform(0.1, 0.5))
        assert holder is not None
        age = max(time.time() - holder.heartbeat, 0)
        raise UserError(
            f"--name {self._folder.name}: {holder} works in {self._folder} (last sign of life "
            f"{age:.0f} s ago); wait for its end, or end it; if it is lost, {TAKE_OVER}=1 takes "
            "over"
        )

    def check(self) -> None:
        """Check that no other command has taken over, as from one that was suspended for long.

        Raises:
            RunFailed: one has.
        """
        if self._lost:
            others = " and ".join(map(str, _holders(self._folder))) or "another command"
            raise RunFailed(f"{self._folder}: {others} took over while this one was silent")

    def release(self) -> None:
        """Let others take the directory."""
        self._released.set()
        if self._beating.ident is not None:
            self._beating.join()
        with contextlib.suppress(OSError):  # another command finds this one dead
            _delete(self._file(self._holder))

    def _file(self, holder: Holder) -> AnyPath:
        return self._folder / f".lock-{holder.token}.json"

    def _write(self) -> None:
        values = {**asdict(self._holder), "heartbeat": time.time()}
        write_atomically(self._file(self._holder), as_json(values))

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            # The disk may be full or the store away for a while, and the whole folder deleted.
            with contextlib.suppress(OSError, RunFailed):
                if self._file(self._holder).is_file():
                    self._write()
                elif self._folder.is_dir():
                    self._lost = True
                    if self._in_main:
                        _thread.interrupt_main()
                    return

    def _taken_over(self, holder: Holder, listener: Listener) -> bool:
        """Take over from a command that is dead; return whether it is."""
        if os.environ.get(TAKE_OVER, "") not in ("", "0"):
            said = f"{TAKE_OVER} is set"
        elif (holder.host, holder.machine) == (self._holder.host, self._holder.machine):
            if _started(holder.pid) == holder.started:
                return False
            said = "it has ended"
        elif self._alive(holder, listener):
            return False
        else:
            said = "it gave no sign of life"
        file = self._file(holder)
        if file.is_file():  # else it has released the directory meanwhile
            _delete(file)
            listener(Warned(f"{self._folder.name}: taken over from {holder}: {said}"))
        return True

    def _alive(self, holder: Holder, listener: Listener) -> bool:
        """Watch a command on another machine; return whether it gives a sign of life."""
        # No clock of another machine is trusted: its file has to stay as it is for a while here.
        left = max(SILENT_S - max(time.time() - holder.heartbeat, 0), 3 * HEARTBEAT_S)
        listener(
            Waiting(
                f"{self._folder.name}: waiting up to {left:.0f} s for a sign of life of {holder}, "
                f"which works in it; {TAKE_OVER}=1 takes over at once"
            )
        )
        until = time.monotonic() + left
        while time.monotonic() < until:
            time.sleep(min(0.5, HEARTBEAT_S / 4))
            now = _read(self._file(holder))
            if now is None:
                return False
            if now != holder:
                return True
        return False


@contextmanager
def locked(folder: AnyPath, listener: Listener) -> Iterator[Lock]:
    """Hold a directory while this lasts.

    Args:
        folder: the directory; exists.
        listener: notified of a command that this one waits for, or takes over from.

    Raises:
        UserError: another command works in it.
        StorageFailed: it cannot be written.
    """
    lock = Lock(folder)
    try:
        lock.take(listener)
        yield lock
    finally:
        lock.release()


def _holders(folder: AnyPath) -> list[Holder]:
    found = (_read(file) for file in folder.glob(".lock-*.json"))
    return [each for each in found if each is not None]


def _read(file: AnyPath) -> Holder | None:
    """Return who wrote a lock's file; None where it is gone, or was written by nobody's command."""
    try:
        return Holder(**json.loads(file.read_bytes()))
    except (ValueError, TypeError):
        return None
    except OSError:
        # A store may say anything of an object that is deleted while it is read.
        if file.is_file():
            raise
        return None


def _delete(file: AnyPath) -> None:
    with contextlib.suppress(FileNotFoundError):  # another command was faster
        file.unlink(missing_ok=True)


def _machine() -> str:
    """Return the machine's start and the process namespace, in which process numbers are unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def _started(pid: int) -> str | None:
    """Return when a process of this machine started; None where there is none."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists() or not _exists(pid):
            return None
        return ""  # not Linux
    # One that has ended stays in the table until its parent asks for how it did.
    return None if state in "ZX" else fields[18]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True
