"""Loading torchmetrics without what only its plots and audio metrics want."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from types import ModuleType
from typing import Any

import lightning_utilities.core.imports as installed

NOT_WANTED = ("matplotlib", "scipy")


def load_torchmetrics_alone() -> None:
    """Load torchmetrics as if neither matplotlib nor SciPy were installed.

    Where they are, it loads both at once, which takes a worker seconds to start. What draws
    metrics raises in this process afterwards, so this is for workers, not for a user's own
    process. What is loaded already is left as it is.
    """
    if "torchmetrics" in sys.modules:
        return
    with _hidden(name for name in NOT_WANTED if name not in sys.modules):
        import torchmetrics

        assert torchmetrics


@contextmanager
def _hidden(names: Iterable[str]) -> Iterator[None]:
    """Hide packages for as long as this lasts, from either way of looking for them."""
    names = tuple(names)
    asked: Any = installed
    version = asked._version  # importlib.metadata.version

    def version_of(name: str) -> str:
        if name in names:
            raise PackageNotFoundError(name)
        return str(version(name))

    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    # With None there, ``import`` fails and ``find_spec`` finds nothing. A requirement that names a
    # version is looked up in the installed metadata instead, so that is replaced too.
    modules.update(dict.fromkeys(names))
    asked._version = version_of
    try:
        yield
    finally:
        asked._version = version
        for name in names:
            del modules[name]
