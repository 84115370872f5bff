"""Every report's page: complete in one file, the same from the same files, safe with any names."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from pathlib import Path

import pytest

from cifar_dist.data.datasets.cifar10 import CLASSES
from cifar_dist.report import report
from cifar_dist.runs.directory import RunDirectory
from tests.reports.pages import FINGERPRINT, Read, make_run, predictions, read


@pytest.mark.parametrize("kind", ["run", "search", "comparison"])
def test_a_page_needs_nothing_but_itself(pages: dict[str, Path], kind: str) -> None:
    page = Read(pages[kind])
    assert not re.search(r"https?:", page.html)
    for _, attributes in page.elements:
        assert str(attributes.get("src", "data:")).startswith("data:")
        assert str(attributes.get("href", "#")).startswith(("#", "data:"))
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"@import|url\((?!#)", page.html)
    ids = [str(attributes["id"]) for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page.html))
    assert {each for pair in referred for each in pair if each} <= set(ids)
    (script,) = re.findall(r"<script>(.*?)</script>", page.html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.html
    assert len(page.html) < 400_000


def test_the_same_files_give_the_same_bytes(pages: dict[str, Path], folder: Path) -> None:
    again = report([pages["run"].parent], folder / "again.html")
    assert Path(str(again)).read_bytes() == pages["run"].read_bytes()


def test_hostile_names_stay_text(folder: Path) -> None:
    hostile = '<script>alert("1")</script><img src=x onerror=alert(1)>'
    classes = (hostile, "$x^{", "a&b", *CLASSES[3:])
    made = make_run(folder, "hostile", kept=predictions(classes), data_dir=f"/data/{hostile}")
    moved = folder / 'run "<i>$'
    shutil.move(made.path, moved)
    environment = {"command": hostile, "dataset_fingerprint": FINGERPRINT}
    RunDirectory(moved).write_environment(environment)
    page = read(moved)
    assert hostile in page.text
    assert len(page.all("script")) == 1
    assert not page.all("i")
    assert all(str(image["src"]).startswith("data:") for image in page.all("img"))
    compared = read(moved, make_run(folder, "tame"), output=folder / "hostile.html")
    assert not compared.all("i")
