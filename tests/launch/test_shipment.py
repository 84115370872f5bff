"""What a job is sent with."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from ray.runtime_env import RuntimeEnv

from launch.shipment import dependencies, runtime_env
from tests.conftest import ROOT
from tests.processes import PATIENCE_S


def test_dependencies_are_this_machines_versions_but_for_ray() -> None:
    found = dependencies()
    assert f"torch=={version('torch').split('+')[0]}" in found
    assert not [each for each in found if each.startswith(("ray", "pytest", "optuna"))]


@pytest.mark.parametrize("tool", ["uv", "pip", None])
def test_ray_takes_the_runtime_environment(tool: str | None) -> None:
    env = RuntimeEnv(**runtime_env(ROOT, tool))
    assert (tool is None) == ("uv" not in env and "pip" not in env)


def test_a_job_uses_rays_public_api_where_this_machine_does(monkeypatch) -> None:
    monkeypatch.delenv("CIFAR_DIST_PLAIN_RAY", raising=False)
    assert "CIFAR_DIST_PLAIN_RAY" not in runtime_env(ROOT, None)["env_vars"]
    monkeypatch.setenv("CIFAR_DIST_PLAIN_RAY", "1")
    assert runtime_env(ROOT, None)["env_vars"]["CIFAR_DIST_PLAIN_RAY"] == "1"


def test_data_runs_and_environments_stay_here(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    for name in ("cifar_dist/a.py", "tune_spaces/a.yaml", "data/x.bin", "runs/r/metrics.csv",
                 ".git/config", ".venv/bin/python", "part.parquet",
                 "cifar_dist/data/b.py"):  # fmt: skip
        file = tmp_path / "work" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    env = runtime_env(tmp_path / "work", None)
    packed = tmp_path / "packed.zip"
    create_package(env["working_dir"], packed, include_gitignore=True, excludes=env["excludes"])
    listed = subprocess.run([sys.executable, "-m", "zipfile", "-l", packed],
                            capture_output=True, text=True, check=True).stdout  # fmt: skip
    files = {line.split()[0] for line in listed.splitlines()[1:] if "." in line.split()[0]}
    assert files == {"cifar_dist/a.py", "tune_spaces/a.yaml", "cifar_dist/data/b.py"}


def test_code_goes_along_where_the_folder_has_none(tmp_path: Path) -> None:
    sent = runtime_env(tmp_path, None)["py_modules"]
    assert [Path(each).name for each in sent] == ["cifar_dist", "tune_spaces"]


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
