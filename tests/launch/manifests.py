"""The manifests of launch/ as tests read them, and the versions that the project pins."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from packaging.utils import canonicalize_name

from cifar_dist.cli import parse_train, parse_tune
from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
RAYJOBS = {name: LAUNCH / "kuberay" / f"rayjob-{name}.yaml" for name in ("train", "tune")}
MANIFESTS = sorted(
    file
    for folder in (LAUNCH, LAUNCH / "kuberay", LAUNCH / "slurm")
    for file in folder.glob("*")
    if file.suffix in (".yaml", ".sbatch", ".bash") or file.name == "Dockerfile"
)
GUIDE = ROOT / "docs" / "cluster.md"

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PARSERS: dict[str, Callable[[list[str]], Any]] = {"train": parse_train, "tune": parse_tune}


def pinned() -> dict[str, str]:
    """What constraints.txt pins, by canonical name; of versions by platform the last."""
    lines = re.findall(
        r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", (ROOT / "constraints.txt").read_text(), re.M
    )
    return {canonicalize_name(name): version for name, version in lines}


def base_image() -> tuple[str, str, str]:
    """Version of Ray, of Python, and platform of the image that the Dockerfile begins with."""
    match = re.search(
        r"^FROM rayproject/ray:([0-9.]+)-py3([0-9]+)-(gpu|cu[0-9]+)$",
        (LAUNCH / "Dockerfile").read_text(),
        re.M,
    )
    assert match
    return match[1], f"3.{match[2]}", match[3]


def ray_cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((LAUNCH / "ray-cluster.yaml").read_text())
    return loaded


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(RAYJOBS[name].read_text())
    return loaded


def pods(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The spec of each pod, by what it is."""
    cluster = spec["rayClusterSpec"]
    templates = {
        "submitter": spec["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        **{group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]},
    }
    return {name: template["spec"] for name, template in templates.items()}


def containers(spec: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each container with its pod's spec, and the autoscaler's, which KubeRay adds."""
    for pod in pods(spec).values():
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            yield pod, container
    yield pods(spec)["head"], spec["rayClusterSpec"]["autoscalerOptions"]


def worker_group(spec: dict[str, Any]) -> dict[str, Any]:
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    found: dict[str, Any] = group
    return found


def parse(kind: str, command: str) -> Any:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", f"cifar_dist.{kind}"]
    return PARSERS[kind](words[3:])
