"""Parquet, the official archive, digits; and what is refused."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from cifar_dist.data import sources
from cifar_dist.data.sources import CIFAR10_CLASSES, Official, Parquet, find_source
from cifar_dist.errors import UserError
from tests.conftest import encoded, write_parquet

# --- Parquet ---------------------------------------------------------------------------------


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
    assert decoded.classes == CIFAR10_CLASSES


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    images = np.zeros((3, 32, 32, 3), np.uint8)
    for shard in (2, 0, 1):
        write_parquet(tmp_path / f"train-0000{shard}-of-00003.parquet", images, np.full(3, shard))
    write_parquet(tmp_path / "test.parquet", images, np.zeros(3))
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
    assert decoded.classes == CIFAR10_CLASSES


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
    table = pa.table({"image": [good, good, cell], "label": [0, 1, 2]})
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match=rf"row 2 is no 32x32 image \(.*{reason}"):
        find_source("cifar10", tmp_path).decode()


def test_labels_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    images = np.zeros((2, 32, 32, 3), np.uint8)
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", images, np.array([0, 10]))
    with pytest.raises(UserError, match="labels outside 0 to 9"):
        find_source("cifar10", tmp_path).decode()


# --- the official archive --------------------------------------------------------------------


class SmallArchive:
    """An archive in the official layout, with few images, and the reader that knows its MD5s."""

    def __init__(self, folder: Path, tampered: str | None = None) -> None:
        batches = folder / "made" / "cifar-10-batches-py"
        batches.mkdir(parents=True)
        random = np.random.default_rng(0)
        self.images: dict[str, np.ndarray] = {}
        self.labels: dict[str, list[int]] = {}
        md5s = {}
        names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
        for name in names:
            if name == "batches.meta":
                content = {"label_names": list(CIFAR10_CLASSES)}
            else:
                self.images[name] = random.integers(0, 256, (4, 3, 32, 32), np.uint8)
                self.labels[name] = random.integers(0, 10, 4).tolist()
                data = self.images[name].reshape(4, -1)
                content = {"data": data, "labels": self.labels[name]}
            (batches / name).write_bytes(pickle.dumps(content))
            md5s[name] = hashlib.md5((batches / name).read_bytes()).hexdigest()
        if tampered is not None:
            (batches / tampered).write_bytes(pickle.dumps(Bomb()))
        self.folder = batches
        self.archive = folder / "cifar-10-python.tar.gz"
        with tarfile.open(self.archive, "w:gz") as archive:
            archive.add(batches, "cifar-10-batches-py")
        self.md5 = hashlib.md5(self.archive.read_bytes()).hexdigest()

        class Reader(CIFAR10):
            train_list: ClassVar = [
                [f"data_batch_{i}", md5s[f"data_batch_{i}"]] for i in range(1, 6)
            ]
            test_list: ClassVar = [["test_batch", md5s["test_batch"]]]
            meta: ClassVar = {
                "filename": "batches.meta",
                "key": "label_names",
                "md5": md5s["batches.meta"],
            }

        self.reader = Reader

    def source(self, path: Path) -> Official:
        return Official(path, self.reader, self.md5)


class Bomb:
    """Tells when it is unpickled."""

    gone_off = False

    def __reduce__(self):
        return (explode, ())


def explode() -> None:
    Bomb.gone_off = True


@pytest.mark.parametrize("packed", [True, False])
def test_the_archive_decodes_to_its_pixels(tmp_path: Path, packed: bool) -> None:
    small = SmallArchive(tmp_path)
    decoded = small.source(small.archive if packed else small.folder).decode()
    train = [f"data_batch_{i}" for i in range(1, 6)]
    assert np.array_equal(decoded.train.images, np.concatenate([small.images[n] for n in train]))
    assert decoded.train.labels.tolist() == [label for n in train for label in small.labels[n]]
    assert np.array_equal(decoded.test.images, small.images["test_batch"])
    assert decoded.classes == CIFAR10_CLASSES


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_nothing_is_unpickled_before_its_md5_is_right(
    tmp_path: Path, name: str, packed: bool
) -> None:
    small = SmallArchive(tmp_path, tampered=name)
    with pytest.raises(UserError, match="wrong MD5"):
        small.source(small.archive if packed else small.folder).decode()
    assert not Bomb.gone_off


def test_an_archive_with_a_wrong_md5_is_refused(tmp_path: Path) -> None:
    SmallArchive(tmp_path)  # its MD5 is not the real archive's
    with pytest.raises(UserError, match=r"has MD5 \w{32}, not c58f30108f718f92721af3b95e74349a"):
        find_source("cifar10", tmp_path)


def test_the_archives_md5_is_torchvisions() -> None:
    assert Official(Path()).archive_md5 == CIFAR10.tgz_md5


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server, on loopback, of the folder ``server``."""
    (tmp_path / "server").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "server")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


def test_missing_data_is_downloaded_to_the_folder(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SmallArchive(tmp_path / "server")
    monkeypatch.setattr(CIFAR10, "url", f"{server}/{small.archive.name}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", small.md5)
    archive = sources.download(tmp_path / "data")
    assert archive.read_bytes() == small.archive.read_bytes()
    assert {file.name for file in archive.parent.iterdir()} <= {archive.name, ".cifar10.lock"}
    assert sources.download(tmp_path / "data") == archive  # there already


@pytest.mark.parametrize("there", [None, b"half an archive"])
def test_a_download_that_fails_says_what_to_do_and_leaves_nothing(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, there: bytes | None
) -> None:
    if there is not None:
        (tmp_path / "server" / "archive").write_bytes(there)
    monkeypatch.setattr(CIFAR10, "url", f"{server}/archive")
    with pytest.raises(UserError, match=r"no CIFAR-10 in .*/data, and the download.*--data-dir"):
        find_source("cifar10", tmp_path / "data")
    assert not (tmp_path / "data").exists()


# --- digits ----------------------------------------------------------------------------------


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    decoded = find_source("digits", tmp_path).decode()
    assert (len(decoded.train.images), len(decoded.test.images)) == (1_500, 297)
    small = np.concatenate([decoded.train.images, decoded.test.images])[:, :, ::4, ::4]
    assert np.array_equal(small[:, 0], small[:, 2])
    ours = sorted(image.tobytes() for image in np.rint(small[:, 0] / 255 * 16).astype(np.uint8))
    theirs = sorted(image.tobytes() for image in load_digits().images.astype(np.uint8))
    assert ours == theirs
