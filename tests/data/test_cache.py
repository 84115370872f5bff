"""The decoded data set: once a node, whole or not at all, shared by all processes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cifar_dist.data import cache
from cifar_dist.data.cache import find_same, prepare, prepare_same
from cifar_dist.data.datasets import Decoded, LabelledImages, find_source
from cifar_dist.errors import UserError
from tests.conftest import ROOT, write_parquet
from tests.processes import PATIENCE_S


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIFAR_DIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Counting:
    """A source that writes a line whenever it is decoded."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def check(self) -> None:
        pass

    def image_side(self) -> int:
        return 32

    def fingerprint(self) -> str:
        return "f" * 64

    def decode(self) -> Decoded:
        with self.log.open("a") as log:
            log.write(f"{os.getpid()}\n")
        images = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), np.uint8)
        labels = np.arange(20, dtype=np.uint8) % 10
        parts = [LabelledImages(images[part], labels) for part in (slice(20), slice(20, 40))]
        return Decoded(*parts, tuple("abcdefghij"))


DECODE = """
import sys
from pathlib import Path
from cifar_dist.data.cache import prepare
from tests.data.test_cache import Counting
dataset = prepare("cifar10", Counting(Path(sys.argv[1])))
print(dataset.open()[0].images.sum())
"""


def test_many_processes_decode_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = [sys.executable, "-c", DECODE, str(log)]
    workers = [
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    sums = {worker.communicate(timeout=PATIENCE_S)[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0] * 4
    assert len(log.read_text().splitlines()) == 1
    assert len(sums) == 1


def test_what_is_read_is_what_was_decoded(tmp_path: Path) -> None:
    source = Counting(tmp_path / "log")
    decoded, dataset = source.decode(), prepare("cifar10", source)
    for got, expected in zip(dataset.open(), (decoded.train, decoded.test), strict=True):
        assert np.array_equal(got.images, expected.images)
        assert np.array_equal(got.labels, expected.labels)
    assert dataset.classes == decoded.classes
    assert (dataset.original_images, dataset.train_images, dataset.validation_images) == (20, 18, 2)
    assert dataset.test_images == 20
    assert (dataset.image_side, dataset.channels) == (32, 3)
    assert dataset.about.side == 32


@dataclass(frozen=True)
class Made:
    """A source of arrays: grey 8x8 images with any labels of so many classes."""

    labels: np.ndarray
    classes: int
    shape: tuple[int, ...] = (1, 8, 8)

    def check(self) -> None:
        pass

    def image_side(self) -> int:
        return self.shape[1]

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def decode(self) -> Decoded:
        images = np.zeros((len(self.labels), *self.shape), np.uint8)
        parts = [LabelledImages(images + part, self.labels) for part in (np.uint8(0), np.uint8(1))]
        return Decoded(*parts, tuple(map(str, range(self.classes))))


@pytest.mark.parametrize(
    ("classes", "kept_as"),
    [(10, "uint8"), (256, "uint8"), (257, "int16"), (300, "int16"), (32_768, "int16"),
     (32_769, "int32"), (70_000, "int32")],
)  # fmt: skip
def test_labels_are_as_wide_as_the_classes_need(classes: int, kept_as: str) -> None:
    labels = np.array([0, classes // 2, classes - 1])
    dataset = prepare("made", Made(labels, classes))
    for part in dataset.open():
        assert part.labels.dtype == kept_as
        assert part.labels.tolist() == labels.tolist()
        assert part.images.shape == (3, 1, 8, 8)
    assert (dataset.image_side, dataset.channels, len(dataset.classes)) == (8, 1, classes)
    assert (len(dataset.mean), dataset.about.channels, dataset.about.side) == (1, 1, 8)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (Made(np.array([0, 300]), 300), "has labels from 0 to 300, outside 0 to 299, its 300 cl"),
        (Made(np.array([-1, 3]), 300), "has labels from -1 to 3, outside 0 to 299"),
        (Made(np.array([0.0, 1.0]), 2), "has labels of float64"),
        (Made(np.array([], np.int64), 2), r"has labels of int64 \[0\] for 0 images"),
        (Made(np.array([0, 1]), 2, (3, 8, 9)), "has images of 9x8 pixels; make them square"),
        (Made(np.array([0, 1]), 2, (8, 8)), r"has images of uint8 \[2, 8, 8\]; all must be"),
    ],
)
def test_what_is_no_data_set_is_refused_before_it_is_kept(
    source: Made, said: str, own_cache: Path
) -> None:
    with pytest.raises(UserError, match=f"^--dataset made: {said}"):
        prepare("made", source)
    assert not list(own_cache.glob("*.safetensors"))


def test_images_are_mapped_not_copied(real_cifar10: Path) -> None:
    train, _ = prepare("cifar10", find_source("cifar10", real_cifar10)).open()
    train.images.max()  # touches every page
    entries = Path("/proc/self/smaps").read_text().split("VmFlags:")
    lines = [line for entry in entries if "cifar10-" in entry for line in entry.splitlines()]

    def kib(name: str) -> int:
        return sum(int(line.split()[1]) for line in lines if line.startswith(name))

    assert kib("Rss:") > 140_000
    assert kib("Anonymous:") == 0  # pages of this process's own


def test_other_data_gets_another_file(small_parquet: Path) -> None:
    first = prepare("cifar10", find_source("cifar10", small_parquet))
    train = small_parquet / "train-00000-of-00001.parquet"
    train.rename(small_parquet / "train.parquet")  # another name, the same data
    assert prepare("cifar10", find_source("cifar10", small_parquet)).path == first.path
    (small_parquet / "more").mkdir()
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (9, 32, 32, 3), np.uint8)
    write_parquet(small_parquet / "more" / "train.parquet", images, np.arange(9))
    assert prepare("cifar10", find_source("cifar10", small_parquet)).path != first.path


def test_another_node_must_hold_the_same_data(small_parquet: Path) -> None:
    here = prepare("cifar10", find_source("cifar10", small_parquet))
    assert prepare_same("cifar10", "/not/looked/at", here.fingerprint) == here
    assert cache.prepare_same("cifar10", small_parquet, here.fingerprint) == here
    with pytest.raises(UserError, match="holds other data"):
        prepare_same("cifar10", small_parquet, "0" * 64)


def test_a_report_finds_the_same_data_or_says_so_but_never_downloads(
    small_parquet: Path, tmp_path: Path
) -> None:
    here = prepare("cifar10", find_source("cifar10", small_parquet))
    assert find_same("cifar10", "/not/looked/at", here.fingerprint) == here
    with pytest.raises(UserError, match="holds other data than the run was trained on"):
        find_same("cifar10", small_parquet, "0" * 64)
    with pytest.raises(UserError, match=r"none: has no CIFAR-10; name the folder that does with"):
        find_same("cifar10", tmp_path / "none", "0" * 64)
    assert not (tmp_path / "none").exists()


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CIFAR_DIST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="CIFAR_DIST_CACHE"):
        prepare("cifar10", Counting(tmp_path / "log"))


@pytest.mark.parametrize(("batch_size", "workers"), [(3, 2), (18, 10)])
def test_a_batch_too_small_for_its_workers_is_refused(
    tmp_path: Path, batch_size: int, workers: int
) -> None:
    dataset = prepare("cifar10", Counting(tmp_path / "log"))
    dataset.check_batches(18, 9)
    with pytest.raises(UserError, match=rf"--batch-size {batch_size}: .* {workers} workers need 2"):
        dataset.check_batches(batch_size, workers)
