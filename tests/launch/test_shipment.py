"""What a job is sent with."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from ray.runtime_env import RuntimeEnv

from launch.shipment import dependencies, job_package, runtime_env
from tests.conftest import ROOT
from tests.processes import PATIENCE_S


def test_dependencies_are_this_machines_versions_but_for_ray() -> None:
    found = dependencies()
    assert f"torch=={version('torch').split('+')[0]}" in found
    assert not [each for each in found if each.startswith(("ray", "pytest", "optuna"))]


@pytest.mark.parametrize("tool", ["uv", "pip", None])
def test_ray_takes_the_runtime_environment(tool: str | None, tmp_path: Path) -> None:
    packed = tmp_path / "package.zip"
    job_package(tmp_path).write(packed)
    env = RuntimeEnv(**runtime_env(packed, tool))
    assert (tool is None) == ("uv" not in env and "pip" not in env)


def test_a_job_uses_rays_public_api_where_this_machine_does(monkeypatch) -> None:
    monkeypatch.delenv("CIFAR_DIST_PLAIN_RAY", raising=False)
    assert "CIFAR_DIST_PLAIN_RAY" not in runtime_env(Path(), None)["env_vars"]
    monkeypatch.setenv("CIFAR_DIST_PLAIN_RAY", "1")
    assert runtime_env(Path(), None)["env_vars"]["CIFAR_DIST_PLAIN_RAY"] == "1"


def test_code_goes_along_where_the_folder_has_none(tmp_path: Path) -> None:
    sent = job_package(tmp_path).files
    assert {"cifar_dist/train.py", "tune_spaces/adamw_steplr.yaml"} <= sent.keys()
    (tmp_path / "cifar_dist").mkdir()
    (tmp_path / "cifar_dist" / "train.py").touch()
    assert job_package(tmp_path).files.keys() == {"cifar_dist/train.py"}


def test_commands_that_would_lose_results_are_refused(tmp_path: Path) -> None:
    for words, said in (
        (["train", "--dataset", "digits"], "--storage-path runs: a job runs in a temporary"),
        (["evaluate", "runs/first"], "runs/first: a job runs in a temporary"),
        (["train", "--no-such-flag"], "--no-such-flag"),
        (["report"], "report: is no command to submit"),
        ([], "nothing: is no command to submit"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "launch.submit", "--address", "http://127.0.0.1:1", "--",
             *words],
            cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.returncode == 2
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
