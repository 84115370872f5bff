"""Each RayJob of launch/kuberay in turn."""

from __future__ import annotations

from typing import Any

import pytest

from tests.launch.manifests import RAYJOBS, read


@pytest.fixture(params=RAYJOBS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def spec(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = read(kind)["spec"]
    return found
