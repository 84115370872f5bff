"""A job's runtime environment: the code, and the packages that it depends on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import cifar_dist
from launch.packing import Package, module, package

STOP_TIMEOUT_S = 180
"""How long a job that is asked to stop may take to save its checkpoint before it is killed."""


def job_package(folder: Path, named: Iterable[str] = ()) -> Package:
    """Choose the files that a job is sent with: a folder's, and the package where it lacks it.

    Args:
        folder: the job runs in a copy of it.
        named: words of the command, some of which may name files.

    Raises:
        UserError: as `launch.packing.package`.
    """
    chosen = package(folder, named)
    installed = Path(cifar_dist.__file__).resolve().parent
    if not (folder / "cifar_dist").is_dir():
        for part in (installed, installed.parent / "tune_spaces"):
            for name, file in module(part).items():
                chosen.files.setdefault(f"{part.name}/{name}", file)
    return chosen


def runtime_env(packed: Path, tool: str | None) -> dict[str, Any]:
    """Return Ray's runtime environment for a job.

    Args:
        packed: the zip file of what `job_package` chose; the job runs in a copy of its content.
        tool: ``uv`` or ``pip``, which installs this machine's versions of what the project depends
            on, on every node, once; None where they are there.
    """
    from cifar_dist.cluster.ray_internals import PLAIN_RAY

    env: dict[str, Any] = {
        # A file: what Ray would pack of a folder holds secrets, and what links lead to.
        "working_dir": str(packed),
        # Ray's own are 3 s. Lines are to come when they are written.
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_TIMEOUT_S), "PYTHONUNBUFFERED": "1"},
    }
    if os.environ.get(PLAIN_RAY):  # the job's driver decides by its own environment
        env["env_vars"][PLAIN_RAY] = os.environ[PLAIN_RAY]
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
