"""Registering what a test adds, for as long as the test lasts."""

from __future__ import annotations

from typing import Any

import pytest

from cifar_dist.registry import Registry


def register(
    patch: pytest.MonkeyPatch, registry: Registry, name: str, entry: Any, **facts: Any
) -> None:
    """Do what a line in `cifar_dist.registry` does before any other module is imported."""
    for each in ("_places", "_loaded", "_entries"):
        if hasattr(registry, each):
            patch.setattr(registry, each, dict(getattr(registry, each)))
    registry.register(name, entry, **facts)
