"""The Dockerfile: what it copies, who it runs as, what it installs."""

from __future__ import annotations

import fnmatch
import re
import shlex

import pytest
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from tests.launch.manifests import LAUNCH, PYPROJECT, pinned


def instructions() -> list[tuple[str, str]]:
    text = (LAUNCH / "Dockerfile").read_text()
    lines = re.sub(r"\s*\\\n\s*", " ", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path at the top out of what `docker build` sees."""
    last = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch.fnmatch(path, line.removeprefix("!")):
            last = not line.startswith("!")
    return last


def test_all_that_the_image_copies_is_there_and_not_ignored() -> None:
    copied = [
        source.rstrip("/")
        for name, rest in instructions()
        if name in ("COPY", "ADD")
        for source in rest.split()[:-1]
    ]
    assert set(copied) >= set(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    for source in copied:
        assert (ROOT / source).exists()
        assert not ignored(source)


@pytest.mark.parametrize("path", [".git", ".venv", "data", "runs", ".ray-1.x", "tests", "a.out"])
def test_the_image_is_built_without(path: str) -> None:
    assert ignored(path)


def test_the_image_runs_as_a_user_who_is_not_root_and_asks_for_a_token() -> None:
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users[-1] == "1000"
    assert ("ENV", "RAY_AUTH_MODE=token") in instructions()


def test_the_image_installs_nothing_that_is_not_pinned_by_hash() -> None:
    (run,) = [rest for name, rest in instructions() if name == "RUN"]
    install = shlex.split(run.partition("&& uv pip install")[2])
    assert {"--require-hashes", "--constraint", "--requirement"} <= set(install)
    names = {
        canonicalize_name(re.split(r"[\[<>=!;]", each)[0])
        for each in PYPROJECT["project"]["dependencies"]
    }
    assert names <= pinned().keys()
