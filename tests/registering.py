"""Registering what a test adds, for as long as the test lasts."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from cifar_dist.config import train
from cifar_dist.registry import LOGGERS, OPTIMIZERS, SCHEDULES, Registry


def register(
    patch: pytest.MonkeyPatch, registry: Registry, name: str, entry: Any, **facts: Any
) -> None:
    """Do what a line in `cifar_dist.registry` does before any other module is imported."""
    for each in ("_places", "_loaded", "_entries"):
        if hasattr(registry, each):
            patch.setattr(registry, each, dict(getattr(registry, each)))
    registry.register(name, entry, **facts)
    # Settings read their choices from the registries when they are imported.
    patch.setattr(train, "OptimizerName", Literal[tuple(OPTIMIZERS)])
    patch.setattr(train, "ScheduleName", Literal[tuple(SCHEDULES)])
    patch.setattr(train, "LoggerName", Literal[("none", *LOGGERS)])
