"""Commands that join a cluster by its address: its token, and its growing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.cluster import Head, head
from tests.processes import PATIENCE_S

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def growing() -> Iterator[Head]:
    """A cluster without a CPU, which may get two nodes of two."""
    with head(cpus=0, grows=True) as started:
        yield started


def train(
    cluster: Head, cwd: Path, *words: str, token_file: Path | None = None
) -> subprocess.CompletedProcess[str]:
    env = {**cluster.environment(token_file), "RAY_ADDRESS": cluster.ray_address}
    return subprocess.run(
        [sys.executable, "-m", "cifar_dist.train", *words],
        cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("token", "said"),
    [("", "the cluster wants a token"), ("another", "wants another token than that of RAY_AUTH")],
)
def test_no_token_and_a_wrong_one_are_refused_in_one_line(
    growing: Head, tmp_path: Path, token: str, said: str
) -> None:
    file = tmp_path / "token"
    if token:
        file.write_text(token)
    done = train(growing, tmp_path, "--dataset", "digits", token_file=file)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "runs").glob("*"))


def test_what_never_comes_is_waited_for_as_long_as_asked(growing: Head, tmp_path: Path) -> None:
    done = train(growing, tmp_path, "--dataset", "digits", "--num-workers", "9",
                 "--wait-for-resources", "3s")  # fmt: skip
    assert done.returncode == 2
    assert "waiting for the cluster to grow: needs 9 x (1 CPU), has room for" in done.stdout
    assert "--wait-for-resources 3s: the cluster has not grown so far" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    done = train(growing, tmp_path, "--dataset", "digits", "--num-workers", "9",
                 "--wait-for-resources", "0")  # fmt: skip
    assert done.returncode == 2
    assert "waiting" not in done.stdout


def test_kubernetes_nodes_without_an_autoscaler_are_refused_at_once(tmp_path: Path) -> None:
    with head(cpus=1, made_by_kubernetes=True) as fixed:
        done = train(fixed, tmp_path, "--dataset", "digits", "--num-workers", "9")
    assert done.returncode == 2
    assert "waiting" not in done.stdout
    assert "--num-workers 9: needs 9 x (1 CPU), and the cluster has 1 CPU" in done.stderr


def test_a_cluster_that_grows_is_waited_for(
    growing: Head, few_digits: Path, tmp_path: Path
) -> None:
    done = train(growing, tmp_path, "--data-dir", str(few_digits), "--num-workers", "2",
                 "--batch-size", "24", "--flip", "0", "--max-epochs", "1",
                 "--no-report")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waiting for the cluster to grow: needs 2 x (1 CPU)" in done.stdout
    assert "at most 10m (--wait-for-resources)" in done.stdout
    assert "epoch 1/1" in done.stdout
