"""Parquet files in the Hugging Face layout: read to the last pixel and label, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cifar_dist.data.datasets import find_source
from cifar_dist.data.datasets.cifar10 import CLASSES
from cifar_dist.data.datasets.parquet import Parquet, find_parquet
from cifar_dist.errors import UserError
from tests.conftest import encoded, write_parquet


@pytest.mark.parametrize("column", ["img", "image"])
@pytest.mark.parametrize("struct", [True, False])
def test_parquet_decodes_to_its_pixels(tmp_path: Path, column: str, struct: bool) -> None:
    random = np.random.default_rng(0)
    expected = {}
    for split, count in (("train", 12), ("test", 5)):
        images = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
        labels = random.integers(0, 10, count)
        write_parquet(tmp_path / "data" / f"{split}-0.parquet", images, labels, column, struct)
        expected[split] = images, labels
    decoded = find_source("cifar10", tmp_path).decode()
    for split, (images, labels) in expected.items():
        got = getattr(decoded, split)
        assert np.array_equal(got.images, images.transpose(0, 3, 1, 2))
        assert np.array_equal(got.labels, labels)
    assert decoded.classes == CLASSES


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    images = np.zeros((3, 32, 32, 3), np.uint8)
    for shard in (2, 0, 1):
        write_parquet(tmp_path / f"train-0000{shard}-of-00003.parquet", images, np.full(3, shard))
    write_parquet(tmp_path / "test.parquet", images, np.full(3, 9))
    labels = find_source("cifar10", tmp_path).decode().train.labels
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_real_files_hold_cifar10(real_cifar10: Path) -> None:
    source = find_source("cifar10", real_cifar10)
    assert isinstance(source, Parquet)
    decoded = source.decode()
    assert decoded.train.images.shape == (50_000, 3, 32, 32)
    assert decoded.test.images.shape == (10_000, 3, 32, 32)
    assert np.bincount(decoded.train.labels).tolist() == [5_000] * 10
    assert np.bincount(decoded.test.labels).tolist() == [1_000] * 10
    assert decoded.classes == CLASSES


def test_a_truncated_file_is_refused(small_parquet: Path) -> None:
    file = small_parquet / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"train-0.*parquet: is no readable Parquet file"):
        find_source("cifar10", small_parquet)


def test_a_file_without_labels_is_refused(small_parquet: Path) -> None:
    import pyarrow.parquet as pq

    file = small_parquet / "test-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["label"]), file)
    with pytest.raises(UserError, match=r"has columns img; needs img or image, and label"):
        find_source("cifar10", small_parquet)


def test_a_split_that_is_missing_is_named(small_parquet: Path) -> None:
    (small_parquet / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"but no test\*\.parquet"):
        find_source("cifar10", small_parquet)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (b"no image", "cannot identify"),
        (encoded(np.zeros((32, 31, 3), np.uint8)), "it has 31x32 pixels"),
    ],
)
def test_a_damaged_image_is_refused_with_its_row(tmp_path: Path, cell: bytes, reason: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = encoded(np.zeros((32, 32, 3), np.uint8))
    for split, last in (("train", 2), ("test", 3)):
        table = pa.table({"image": [good, good, cell], "label": [0, 1, last]})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match=rf"row 2 is no 32x32 image \(.*{reason}"):
        find_source("cifar10", tmp_path).decode()


def test_labels_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    images = np.zeros((2, 32, 32, 3), np.uint8)
    for split, first in (("train", 0), ("test", 1)):
        write_parquet(tmp_path / f"{split}.parquet", images, np.array([first, 10]))
    with pytest.raises(UserError, match="labels outside 0 to 9"):
        find_source("cifar10", tmp_path).decode()


# --- any classes, any size ----------------------------------------------------------------------


def write_splits(folder: Path, labels: np.ndarray, side: int = 8) -> Path:
    """Write each split with an image for each label; an image's corners hold label and split."""
    images = np.zeros((len(labels), side, side, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = labels // 256, labels % 256
    for split in ("train", "test"):
        images[:, -1, -1, 0] = split == "test"
        write_parquet(folder / f"{split}.parquet", images, labels)
    return folder


def named(file: Path, names: list[str]) -> None:
    """Write class names into a file, as the ``datasets`` library does."""
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), file)


def test_classes_without_names_have_their_numbers(tmp_path: Path) -> None:
    source = find_parquet(write_splits(tmp_path, np.arange(300)))
    decoded = source.decode()
    assert decoded.classes == tuple(map(str, range(300)))
    assert decoded.test.labels.tolist() == list(range(300))


def test_names_in_the_files_come_before_a_data_sets_own(tmp_path: Path) -> None:
    write_splits(tmp_path, np.arange(3))
    assert find_parquet(tmp_path, CLASSES).decode().classes == CLASSES
    named(tmp_path / "train.parquet", ["one", "two", "three"])
    assert find_parquet(tmp_path, CLASSES).decode().classes == ("one", "two", "three")


@pytest.mark.parametrize("labels", [[0, 1, 3], [-1, 0, 1]])
def test_labels_outside_the_named_classes_are_refused(tmp_path: Path, labels: list[int]) -> None:
    write_splits(tmp_path, np.array(labels))
    named(tmp_path / "train.parquet", ["one", "two", "three"])
    with pytest.raises(UserError, match=r"train\.parquet: has labels outside 0 to 2; "):
        find_parquet(tmp_path).decode()


def test_a_test_label_that_no_training_image_has_is_refused(tmp_path: Path) -> None:
    write_splits(tmp_path, np.arange(5))
    write_parquet(tmp_path / "test.parquet", np.zeros((1, 8, 8, 3), np.uint8), np.array([5]))
    with pytest.raises(UserError, match=r"test\.parquet: has labels outside 0 to 4"):
        find_parquet(tmp_path).decode()


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["cat", "dog"], "column label holds string; needs numbers of classes"),
        ([0.5, 1.0], "column label holds double; needs numbers of classes"),
        ([0, None], "has 1 images without a label"),
    ],
)
def test_labels_that_are_no_numbers_are_refused(tmp_path: Path, labels: list, said: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [encoded(np.zeros((8, 8, 3), np.uint8))] * 2, "label": labels})
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match=said):
        find_parquet(tmp_path).decode()


def test_the_side_is_that_of_the_first_image_unless_said(tmp_path: Path) -> None:
    write_splits(tmp_path, np.arange(3), side=8)
    assert find_parquet(tmp_path).image_side() == 8
    assert find_parquet(tmp_path).decode().train.images.shape == (3, 3, 8, 8)
    with pytest.raises(UserError, match="row 0 is no 32x32 image"):
        find_source("cifar10", tmp_path).decode()


def test_images_that_are_not_square_are_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        images = np.zeros((2, 8, 9, 3), np.uint8)
        write_parquet(tmp_path / f"{split}.parquet", images, np.arange(2))
    with pytest.raises(UserError, match=r"row 0 is no square image \(it has 9x8 pixels\)"):
        find_parquet(tmp_path).image_side()


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    write_splits(tmp_path, np.arange(0))
    with pytest.raises(UserError, match="holds no images"):
        find_parquet(tmp_path).check()
