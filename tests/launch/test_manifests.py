"""What all manifests hold to: commands in comments that parse, no secrets, one set of versions."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from tests.conftest import ROOT
from tests.launch.manifests import (
    GUIDE,
    LAUNCH,
    MANIFESTS,
    PARSERS,
    PYPROJECT,
    base_image,
    containers,
    pinned,
    ray_cluster,
)

# --- Commands in comments


COMMAND_IN_A_COMMENT = re.compile(
    r"(?:sbatch\b.*? launch/slurm/(train|tune)\.sbatch"
    r"|python -m (?:cifar_dist\.|launch\.submit .* -- )(train|tune)) (.*)"
)


def commands_in_comments() -> list[tuple[str, str, str]]:
    found = []
    for file in [*MANIFESTS, GUIDE]:
        text = re.sub(r" \\\n# *", " ", file.read_text())
        for line in text.splitlines():
            block = file == GUIDE or line.startswith("#  ")
            if block and (match := COMMAND_IN_A_COMMENT.search(line)):
                # Where there are GPUs, the batch files say so themselves.
                given = "--use-gpu " if match[1] else ""
                found.append((file.name, match[1] or match[2], given + match[3]))
    return found


@pytest.mark.parametrize(("file", "command", "words"), commands_in_comments())
def test_commands_in_comments_are_ones_that_the_command_line_takes(
    file: str, command: str, words: str
) -> None:
    PARSERS[command](shlex.split(words.replace(" --resume", "")))  # of a run that is not there


def test_comments_do_hold_commands() -> None:
    assert {file for file, _, _ in commands_in_comments()} >= {
        "train.sbatch",
        "tune.sbatch",
        "ray-cluster.yaml",
        "cluster.md",
    }


# --- Secrets


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_no_manifest_holds_a_secret(file: Path) -> None:
    text = file.read_text()
    assert not re.search(r"\b[0-9a-fA-F]{32,}\b", text), "a token or a digest"
    assert not re.search(r"kind: *Secret\b", text)
    assert not re.search(r"RAY_AUTH_TOKEN *[=:]", text), "by file or from KubeRay's Secret only"
    assert not re.search(r"(?i)\b(password|passwd|api[_-]?key|secret)\s*[:=]\s*\S", text)
    assert "BEGIN" not in text


# --- Versions


def test_the_ray_of_manifests_and_image_is_the_one_of_constraints(spec: dict[str, Any]) -> None:
    ray = pinned()["ray"]
    assert base_image()[0] == ray
    assert spec["rayClusterSpec"]["rayVersion"] == ray


def test_the_python_of_the_image_is_one_that_the_project_takes() -> None:
    assert base_image()[1] in SpecifierSet(PYPROJECT["project"]["requires-python"])


def test_all_name_the_image_of_this_version(spec: dict[str, Any]) -> None:
    image = f"registry.example.com/cifar-dist:{PYPROJECT['project']['version']}"
    assert {each["image"] for _, each in containers(spec) if "image" in each} == {image}
    assert ray_cluster()["docker"]["image"] == image
    assert f"-t {image} ." in (LAUNCH / "Dockerfile").read_text()


def test_uv_of_the_image_is_the_one_of_the_makefile() -> None:
    makefile = re.search(r"^UV := (\S+)$", (ROOT / "Makefile").read_text(), re.M)
    assert makefile
    assert f" uv=={makefile[1]} " in (LAUNCH / "Dockerfile").read_text()
