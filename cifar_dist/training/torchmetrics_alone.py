"""Loading torchmetrics without the packages that only some of its metrics use."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires
from types import ModuleType
from typing import Any

import lightning_utilities.core.imports as installed
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def load_torchmetrics_alone() -> None:
    """Load torchmetrics as if none of its optional packages were installed.

    Where they are, it loads matplotlib, SciPy and transformers at once, which takes a worker
    seconds to start. Metrics that need them raise in this process afterwards, so this is for
    workers, not for a user's own process. What is loaded already is left as it is.
    """
    if "torchmetrics" in sys.modules:
        return
    # What torch itself would load meanwhile is not hidden from it.
    import torch

    assert torch
    with _hidden(optional_packages()):
        import torchmetrics

        assert torchmetrics


def optional_packages() -> set[str]:
    """Return the packages that torchmetrics uses where they are installed, as it names them."""
    # All of them, never some: one that is loaded may itself need one that is hidden, and fail.
    requirements = [Requirement(each) for each in requires("torchmetrics") or ()]
    optional = {each.name for each in requirements if "extra" in str(each.marker)}
    return optional - {each.name for each in requirements if "extra" not in str(each.marker)}


@contextmanager
def _hidden(packages: Iterable[str]) -> Iterator[None]:
    """Hide packages for as long as this lasts, from either way of looking for them."""
    # Distributions are looked up in any spelling: rouge-score is rouge_score's.
    distributions = {canonicalize_name(name) for name in packages}
    names = {name.replace("-", "_") for name in packages} - sys.modules.keys()
    asked: Any = installed
    version = asked._version  # importlib.metadata.version

    def version_of(name: str) -> str:
        if canonicalize_name(name) in distributions:
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
        # They remember what was not found, also for Lightning, which asks the same functions.
        for remembering in (installed.package_available, installed.module_available):
            remembering.cache_clear()
