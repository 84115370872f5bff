"""A submitted run on two nodes with addresses and files of their own, but for a shared folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.hosts import Namespaces, namespaces_allowed
from tests.processes import PATIENCE_S

pytestmark = pytest.mark.slow

JOB_SERVER_PORT = 8265
SUBNET = "10.215.0"
"""Not that of the clusters whose nodes are killed, which may be up at the same time."""


@dataclass(frozen=True)
class TwoNodes:
    cluster: Namespaces
    shared: Path
    """The same on both nodes, and here."""
    apart: Path
    """Each node's own; here it is empty."""

    def submit(self, *words: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.run(
            [sys.executable, "-m", "launch.submit", "--address",
             f"http://{SUBNET}.1:{JOB_SERVER_PORT}", "--image-has-it", "--", *words],
            cwd=ROOT, env={**env, "RAY_AUTH_TOKEN_PATH": str(self.shared / "token")},
            capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip


@pytest.fixture(scope="module")
def nodes(few_digits: Path) -> Iterator[TwoNodes]:
    if not namespaces_allowed():
        pytest.skip("two nodes with addresses of their own: network namespaces need root and ip")
    # Short: names of sockets are.
    with tempfile.TemporaryDirectory(prefix="cd", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        shared, apart = folder / "shared", folder / "own"
        apart.mkdir()
        shutil.copytree(few_digits, shared / "data")
        (shared / "token").write_text(os.urandom(24).hex())
        cluster = Namespaces(
            folder,
            head_words=("--num-cpus=1", "--include-dashboard=true", f"--dashboard-host={SUBNET}.1",
                        f"--dashboard-port={JOB_SERVER_PORT}"),
            env={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(shared / "token"),
                 "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            subnet=SUBNET,
            apart=apart,
        )  # fmt: skip
        with cluster.running():
            cluster.add()
            yield TwoNodes(cluster, shared, apart)


def train(nodes: TwoNodes, storage: Path) -> list[str]:
    return ["train", "--data-dir", str(nodes.shared / "data"), "--num-workers", "2",
            "--batch-size", "24", "--flip", "0", "--max-epochs", "2", "--storage-path",
            str(storage), "--name", "run", "--no-report"]  # fmt: skip


def test_a_path_that_the_other_node_does_not_see_is_refused(nodes: TwoNodes) -> None:
    done = nodes.submit(*train(nodes, nodes.apart / "runs"))
    assert done.returncode == 2
    assert f"--storage-path {nodes.apart}/runs: node {SUBNET}.2 does not see it" in done.stdout


def test_a_run_spreads_over_both_and_is_complete_on_the_shared_path(nodes: TwoNodes) -> None:
    done = nodes.submit(*train(nodes, nodes.shared / "runs"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 workers x 1 CPU on Ray, 2 nodes" in done.stdout
    run = nodes.shared / "runs" / "run"
    assert {each.name for each in run.iterdir()} >= {
        "checkpoints", "config.yaml", "environment.json", "metrics.csv", "model.safetensors",
        "summary.json",
    }  # fmt: skip
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"
    rows = (run / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[3] for row in rows[1:]] == ["2", "2"]  # world_size
    # Each node decoded the data set: a worker was there, since each has room for one.
    head, other = nodes.cluster.up
    decoded = [list((nodes.cluster.own(name) / "cache").glob("*")) for name in (head, other)]
    for files in decoded:
        assert sorted(file.suffix for file in files) == [".lock", ".safetensors"]
    assert decoded[0][0].name in {file.name for file in decoded[1]}
    assert list(nodes.apart.iterdir()) == []
