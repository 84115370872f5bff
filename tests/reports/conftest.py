"""A run, a search and a page of each kind, made once for all tests of reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifar_dist.report import report
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.search.directory import SearchDirectory
from tests.reports.pages import make_run, make_search, predictions


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="package")
def run(folder: Path) -> RunDirectory:
    return make_run(folder, kept=predictions(), workers=(2, 2, 1), lr=0.002)


@pytest.fixture(scope="package")
def search(folder: Path) -> SearchDirectory:
    return make_search(folder)


@pytest.fixture(scope="package")
def pages(run: RunDirectory, search: SearchDirectory, folder: Path) -> dict[str, Path]:
    """A page of each kind."""
    other = make_run(folder, "other", epochs=2, status="interrupted", seed=1)
    compared = report([run.path, other.path], folder / "comparison.html")
    found = {"run": report([run.path]), "search": report([search.path]), "comparison": compared}
    return {kind: Path(str(file)) for kind, file in found.items()}
