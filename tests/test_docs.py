"""Documents that must not fall behind the code."""

from __future__ import annotations

import ast
import importlib.util
import re

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_of_flags_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (ROOT / "docs" / "flags.md").read_text() == generate.text(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_can_be_read_at_once() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_every_station_of_the_five_ways_is_there() -> None:
    stations = re.findall(
        r"^\| `(cifar_dist/\S+\.py)` \| `(\w+)` \|",
        (ROOT / "docs" / "how-it-works.md").read_text(),
        re.M,
    )
    assert len(stations) > 30
    for file, name in stations:
        found = {
            node.name
            for node in ast.walk(ast.parse((ROOT / file).read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }
        assert name in found, f"{file}: {name}"


def test_the_headings_of_the_five_ways_count_their_files() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    for way in page.split("\n## ")[1:]:
        files = re.findall(r"^\| `(\S+\.py)`", way, re.M)
        assert len(files) == len(set(files))
        assert way.splitlines()[0].split("(")[1].startswith(f"{len(files)} files")
