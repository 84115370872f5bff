"""A Ray cluster as an operator starts it: a head with a job server that wants a token."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT
from tests.processes import descendants

RAY = Path(sys.executable).parent / "ray"
START_TIMEOUT_S = 60


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """A cluster of this machine."""

    address: str
    """Of its job server."""
    token_file: Path
    folder: Path
    """Where Ray keeps its logs."""

    def environment(self, token_file: Path | None = None) -> dict[str, str]:
        """For commands that speak to it, with its token or another."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**env, "PYTHONPATH": str(ROOT),
                "RAY_AUTH_TOKEN_PATH": str(token_file or self.token_file)}  # fmt: skip


@contextlib.contextmanager
def head(cpus: int = 2) -> Iterator[Head]:
    """A head on the loopback interface, with a token of its own, for as long as this lasts."""
    # Short: names of sockets are.
    with tempfile.TemporaryDirectory(prefix="cd", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        token_file = folder / "token"
        token_file.write_text(os.urandom(24).hex())
        dashboard = free_port()
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        ray = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={cpus}",
             "--node-ip-address=127.0.0.1", f"--port={free_port()}", "--include-dashboard=true",
             "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
             f"--temp-dir={folder / 'ray'}"],
            env={**env, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file),
                 "PATH": f"{RAY.parent}:{os.environ['PATH']}"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            _wait_for("127.0.0.1", dashboard)
            yield Head(f"http://127.0.0.1:{dashboard}", token_file, folder / "ray")
        finally:
            left = descendants(ray.pid)
            ray.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                ray.wait(30)
            for pid in {ray.pid, *left}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ray.wait()


def _wait_for(host: str, port: int) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), 1).close()
            return
        time.sleep(0.5)
    raise TimeoutError(f"no job server at {host}:{port}")
