"""What holds for every data set: found by its name, with traits that cost nothing to read."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cifar_dist.data.datasets import Decoded, LabelledImages, find_source
from cifar_dist.errors import UserError
from cifar_dist.registry import DATASETS, DatasetTraits, dataset_traits, with_traits
from tests.conftest import ROOT
from tests.processes import PATIENCE_S

LIGHT = """
import sys
from cifar_dist.config.train import TrainConfig
from cifar_dist.registry import DATASETS
for name in DATASETS:
    TrainConfig(dataset=name)
heavy = {"numpy", "torch", "torchvision", "pyarrow", "sklearn", "pandas", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""


def test_settings_of_any_data_set_load_no_heavy_library() -> None:
    subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, check=True, timeout=PATIENCE_S)


@dataclass(frozen=True)
class Squares:
    """Grey squares out of a file with their number."""

    count: int

    def check(self) -> None:
        if not self.count:
            raise UserError("no squares")

    def image_side(self) -> int:
        return 5

    def fingerprint(self) -> str:
        return f"{self.count:064}"

    def decode(self) -> Decoded:
        images = np.full((self.count, 1, 5, 5), 9, np.uint8)
        some = LabelledImages(images, np.arange(self.count) % 2)
        return Decoded(some, some, ("light", "dark"))


def find_squares(folder: Path) -> Squares | None:
    file = folder / "squares.txt"
    return Squares(int(file.read_text())) if file.exists() else None


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DATASETS, "_places", dict(DATASETS._places))
    monkeypatch.setattr(DATASETS, "_loaded", dict(DATASETS._loaded))
    return DATASETS.register


def test_a_function_and_a_name_make_a_data_set(tmp_path: Path, register) -> None:
    register("squares", find_squares)
    assert dataset_traits("squares") == DatasetTraits()
    with pytest.raises(UserError, match=r"has no squares; name the folder that does with --data-d"):
        find_source("squares", tmp_path)
    (tmp_path / "squares.txt").write_text("7")
    assert find_source("squares", tmp_path) == Squares(7)
    (tmp_path / "squares.txt").write_text("0")
    with pytest.raises(UserError, match="no squares"):
        find_source("squares", tmp_path)


def test_what_is_missing_is_downloaded_only_where_that_is_wanted(tmp_path: Path, register) -> None:
    def download(folder: Path) -> None:
        (folder / "squares.txt").write_text("3")

    @with_traits(DatasetTraits(title="the Squares", download=download))
    def find(folder: Path) -> Squares | None:
        return find_squares(folder)

    register("squares", find)
    with pytest.raises(UserError, match="has no the Squares; name the folder"):
        find_source("squares", tmp_path, download=False)
    assert not list(tmp_path.iterdir())
    assert find_source("squares", tmp_path) == Squares(3)
    assert find_source("squares", tmp_path, download=False) == Squares(3)


def test_traits_are_those_of_the_data_sets() -> None:
    digits, cifar10 = dataset_traits("digits"), dataset_traits("cifar10")
    assert (digits.mirrored_alike, digits.needs_folder, digits.download) == (False, False, None)
    assert (cifar10.mirrored_alike, cifar10.needs_folder) == (True, True)
    assert cifar10.download is not None


def test_a_folder_that_cannot_be_read_is_named(register) -> None:
    def find(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    register("closed", find)
    with pytest.raises(UserError, match=r"^here: cannot be read \(Permission denied"):
        find_source("closed", "here")
