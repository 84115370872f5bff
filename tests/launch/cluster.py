"""A Ray cluster as an operator starts it: a head with a job server that wants a token."""

from __future__ import annotations

import contextlib
import json
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
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.conftest import ROOT
from tests.processes import PATIENCE_S, descendants

RAY = Path(sys.executable).parent / "ray"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """A cluster of this machine."""

    address: str
    """Of its job server."""
    ray_address: str
    """For ``RAY_ADDRESS``."""
    token_file: Path
    folder: Path
    """Where Ray keeps its logs."""

    def environment(self, token_file: Path | None = None) -> dict[str, str]:
        """For commands that speak to it, with its token or another."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**env, "PYTHONPATH": str(ROOT),
                "RAY_AUTH_TOKEN_PATH": str(token_file or self.token_file)}  # fmt: skip


@contextlib.contextmanager
def head(cpus: int = 2, grows: bool = False, made_by_kubernetes: bool = False) -> Iterator[Head]:
    """A head on the loopback interface, with a token of its own, for as long as this lasts.

    Args:
        cpus: the head's.
        grows: run Ray's autoscaler, with its provider that starts nodes of 2 CPUs on this machine.
        made_by_kubernetes: start it as KubeRay does where no autoscaler is asked for.
    """
    # Short: names of sockets are.
    with tempfile.TemporaryDirectory(prefix="cd", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        token_file = folder / "token"
        token_file.write_text(os.urandom(24).hex())
        dashboard = free_port()
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        port = free_port()
        autoscaling = []
        if grows:
            config = folder / "autoscaling.yaml"
            config.write_text(json.dumps(_autoscaling(f"127.0.0.1:{port}")))
            autoscaling = [f"--autoscaling-config={config}"]
            env |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                    "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}  # fmt: skip
        if made_by_kubernetes:
            autoscaling = ["--no-monitor"]
            env |= {"RAY_CLOUD_INSTANCE_ID": "pod-1", "RAY_NODE_TYPE_NAME": "headgroup"}
        ray = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={cpus}",
             "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=true",
             "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
             # Its usual one belongs to whichever cluster of the machine was first.
             f"--dashboard-agent-listen-port={free_port()}",
             f"--temp-dir={folder / 'ray'}", *autoscaling],
            env={**env, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file),
                 "PATH": f"{RAY.parent}:{os.environ['PATH']}"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            _wait_for("127.0.0.1", dashboard)
            yield Head(
                f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", token_file, folder / "ray"
            )
        finally:
            left = descendants(ray.pid)
            ray.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                ray.wait(30)
            for pid in {ray.pid, *left}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ray.wait()


def _autoscaling(gcs_address: str) -> dict[str, Any]:
    """What the autoscaler is to know of a cluster that may have two nodes of 2 CPUs."""
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray",
                "worker_start_ray")  # fmt: skip
    return {
        "cluster_name": "grows",
        "max_workers": 2,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 1.0,
        "provider": {
            # By its class: under its own name Ray looks for a file that wheels do not hold.
            "type": "external",
            "module": provider,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": gcs_address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",
        "docker": {}, "auth": {}, "file_mounts": {}, "cluster_synced_files": [],
        "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
        **{f"{each}_commands": [] for each in commands},
    }  # fmt: skip


def _wait_for(host: str, port: int) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), 1).close()
            return
        time.sleep(0.5)
    raise TimeoutError(f"no job server at {host}:{port}")
