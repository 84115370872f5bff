"""A job's runtime environment: the code, and the packages that it depends on."""

from __future__ import annotations

import os
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import cifar_dist

LEFT_HERE = [
    ".git/", ".venv/", "venv/", "env/", "/data/", "/runs/", "__pycache__/", "*.egg-info/",
    ".*_cache/", "*.parquet", "*.safetensors", "*.ckpt", "*.whl",
]  # fmt: skip
"""Not sent, in the syntax of a .gitignore; files that .gitignore files name are omitted besides."""
STOP_TIMEOUT_S = 180
"""How long a job that is asked to stop may take to save its checkpoint before it is killed."""


def runtime_env(folder: Path, tool: str | None) -> dict[str, Any]:
    """Return Ray's runtime environment for a job.

    Args:
        folder: whose files are sent; the job runs in a copy of it.
        tool: ``uv`` or ``pip``, which installs this machine's versions of what the project depends
            on, on every node, once; None where they are there.
    """
    from cifar_dist.cluster.ray_internals import PLAIN_RAY

    env: dict[str, Any] = {
        "working_dir": str(folder),
        "excludes": LEFT_HERE,
        # Ray's own are 3 s. Lines are to come when they are written.
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_TIMEOUT_S), "PYTHONUNBUFFERED": "1"},
    }
    if os.environ.get(PLAIN_RAY):  # the job's driver decides by its own environment
        env["env_vars"][PLAIN_RAY] = os.environ[PLAIN_RAY]
    if not (folder / "cifar_dist").is_dir():
        package = Path(cifar_dist.__file__).resolve().parent
        spaces = package.parent / "tune_spaces"
        env["py_modules"] = [str(each) for each in (package, spaces) if each.is_dir()]
    if tool is not None:
        env[tool] = {"packages": dependencies()}
    return env


def dependencies() -> list[str]:
    """Return this machine's versions of the dependencies, but for Ray, which a cluster has."""
    required = [Requirement(line) for line in requires("cifar-dist") or []]
    # Those with a marker belong to extras. A local version, such as 2.15.0+cpu, is not on the
    # package index, and its installation would fail on every node.
    names = [each.name for each in required if each.name != "ray" and not each.marker]
    return [f"{name}=={version(name).split('+')[0]}" for name in names]
