"""Hosts of a Ray cluster on one machine: network namespaces where they are allowed, else nodes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent.parent
RAY = Path(sys.executable).parent / "ray"
PORT = 6389


class Hosts(Protocol):
    """A head that the driver runs on, without CPUs for workers, and hosts with one CPU each."""

    address: str
    """Of the cluster, for ``RAY_ADDRESS``."""
    kind: str
    """In words."""

    def add(self) -> None:
        """Start a host, and wait until it has joined."""

    def lose(self, name: str) -> None:
        """Kill everything that runs on one of the hosts, all at once, its connections too."""

    def notice(self, name: str, seconds: float) -> None:
        """Say, as a cloud does, that one of the hosts will be gone in so many seconds."""

    def names(self) -> list[str]:
        """The hosts that are up."""

    def command(self, words: list[str]) -> list[str]:
        """A command that runs on the head."""


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """A cluster of a head and so many hosts, for as long as this lasts."""
    with _namespaces() if namespaces_allowed() else _nodes() as cluster:
        for _ in range(count):
            cluster.add()
        yield cluster


def namespaces_allowed() -> bool:
    """Whether this process may make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"cdtest{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return made


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@dataclass
class Namespaces:
    """Each host in a network namespace with an address of its own, on one bridge."""

    kind = "network namespaces"
    folder: Path
    head_words: tuple[str, ...] = ("--num-cpus=0", "--include-dashboard=false")
    env: dict[str, str] = field(default_factory=dict)
    """Of every host, beside what `environment` says."""
    subnet: str = "10.213.0"
    """Clusters that are up at the same time need one each."""
    apart: Path | None = None
    """A folder in which every host finds files of its own; ``folder`` where there is none."""
    tag: str = field(default_factory=lambda: f"cd{os.getpid() % 100_000}")
    up: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    made: int = 0

    @property
    def address(self) -> str:
        return f"{self.subnet}.1:{PORT}"

    def start_head(self) -> None:
        _ip("link", "add", self.tag, "type", "bridge")
        _ip("address", "add", f"{self.subnet}.254/24", "dev", self.tag)  # for this process
        _ip("link", "set", self.tag, "up")
        self._start("--head", f"--port={PORT}", f"--temp-dir={self.apart or self.folder}",
                    *self.head_words)  # fmt: skip

    def add(self) -> None:
        self._start(f"--address={self.address}", "--num-cpus=1")

    def _start(self, *words: str) -> None:
        self.made += 1
        name, link = f"{self.tag}n{self.made}", f"{self.tag}v{self.made}"
        ip = f"{self.subnet}.{self.made}"
        _ip("netns", "add", name)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", link, "master", self.tag, "up")
        for setting in (f"addr add {ip}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _ip("-n", name, *setting.split())
        self.up[name] = subprocess.Popen(
            self._on(name, [str(RAY), "start", "--block", "--disable-usage-stats",
                            f"--node-ip-address={ip}", *words]),
            env=environment(GLOO_SOCKET_IFNAME="eth0",
                             CIFAR_DIST_CACHE=str(self.cache(name)), **self.env),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._wait_until_joined(ip)

    def cache(self, name: str) -> Path:
        """A host's own, as that host names it."""
        return self.apart / "cache" if self.apart else self.folder / f"cache-{name}"

    def own(self, name: str) -> Path:
        """A host's own files, as this process names them."""
        folder = self.folder / f"of-{name}"
        folder.mkdir(exist_ok=True)
        return folder

    def _on(self, name: str, words: list[str]) -> list[str]:
        """A command on a host. What is mounted there, ``ip netns exec`` mounts for it alone."""
        inside = ["ip", "netns", "exec", name]
        if self.apart is None:
            return [*inside, *words]
        mount = ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"']
        return [*inside, *mount, str(self.own(name)), str(self.apart), *words]

    def _wait_until_joined(self, ip: str) -> None:
        # In a process of its own: whether Ray shows a token is settled once in each.
        subprocess.run(
            [sys.executable, "-m", "tests.faults.hosts", self.address, ip],
            env=environment(**self.env), check=True,
        )  # fmt: skip

    def names(self) -> list[str]:
        return list(self.up)[1:]

    def lose(self, name: str) -> None:
        _ip("-n", name, "link", "set", "eth0", "down")  # nobody hears of the end
        self._end(name)

    def notice(self, name: str, seconds: float) -> None:
        from ray._raylet import GcsClient

        ip = f"{self.subnet}.{name.rpartition('n')[2]}"
        for node_id, node in GcsClient(address=self.address).get_all_node_info().items():
            if node.node_manager_address == ip:
                _drain(self.address, node_id.hex(), seconds)

    def _end(self, name: str) -> None:
        for pid in _ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self.up.pop(name).wait()
        # A namespace lives on until its last process is gone for good.
        _ip("link", "delete", name.replace("n", "v"))
        _ip("netns", "delete", name)

    def command(self, words: list[str]) -> list[str]:
        return self._on(next(iter(self.up)), words)

    @contextlib.contextmanager
    def running(self) -> Iterator[Namespaces]:
        """The head, and what is added to it, for as long as this lasts."""
        try:
            self.start_head()
            yield self
        finally:
            self.stop()

    def stop(self) -> None:
        for name in reversed(list(self.up)):
            self._end(name)
        _ip("link", "delete", self.tag)


@contextlib.contextmanager
def _namespaces() -> Iterator[Namespaces]:
    # Short: names of sockets are.
    with (
        tempfile.TemporaryDirectory(prefix="cd", ignore_cleanup_errors=True) as folder,
        Namespaces(Path(folder)).running() as cluster,
    ):
        yield cluster


@dataclass
class _Nodes:
    """Each host a Ray node of its own, all at one address."""

    kind = "nodes at one address"
    cluster: Any
    up: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> None:
        self.up.append(self.cluster.add_node(num_cpus=1))
        self.cluster.wait_for_nodes()

    def lose(self, name: str) -> None:
        node = self.up.pop(self.names().index(name))
        self.cluster.remove_node(node, allow_graceful=False)

    def notice(self, name: str, seconds: float) -> None:
        _drain(self.address, name, seconds)

    def names(self) -> list[str]:
        return [str(node.node_id) for node in self.up]

    def command(self, words: list[str]) -> list[str]:
        return words


@contextlib.contextmanager
def _nodes() -> Iterator[_Nodes]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        yield _Nodes(cluster)
    finally:
        cluster.shutdown()


def _drain(address: str, node_id: str, seconds: float) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + seconds) * 1000)
    accepted, why = GcsClient(address=address).drain_node(node_id, reason, "a test", deadline_ms)
    assert accepted, why


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that belongs to a test's cluster."""
    # No cluster outside this machine is spoken to, and no token of a person's is used.
    # A host that falls silent is given up after seconds; by Ray's own settings, after a minute.
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "3000",
        "RAY_health_check_failure_threshold": "3",
        **more,
    }


def _wait_until_joined(address: str, ip: str) -> None:
    """Wait until a node with this address is part of a cluster."""
    from ray._raylet import GcsClient

    def joined() -> bool:
        try:
            nodes = GcsClient(address=address).get_all_node_info(timeout=2).values()
        except Exception:  # the head is not there yet
            return False
        return any(node.state == 0 and node.node_manager_address == ip for node in nodes)

    _wait(joined)


def _wait(ready: Any, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "the cluster does not come up"
        time.sleep(0.5)


if __name__ == "__main__":
    _wait_until_joined(*sys.argv[1:])
