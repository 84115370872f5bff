"""CIFAR-10 as the official archive, as its folder, and downloaded; and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from cifar_dist.data.datasets import find_source
from cifar_dist.data.datasets.cifar10 import ARCHIVE, CLASSES
from cifar_dist.data.datasets.official import Official
from cifar_dist.errors import UserError


class SmallArchive:
    """An archive in the official layout, with few images, and its own checksums."""

    def __init__(
        self, folder: Path, tampered: str | None = None, seed: int = 0, images: int = 4
    ) -> None:
        batches = folder / "made" / "cifar-10-batches-py"
        batches.mkdir(parents=True)
        random = np.random.default_rng(seed)
        self.images: dict[str, np.ndarray] = {}
        self.labels: dict[str, list[int]] = {}
        md5s = {}
        names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
        for name in names:
            if name == "batches.meta":
                content = {"label_names": list(CLASSES)}
            else:
                self.images[name] = random.integers(0, 256, (images, 3, 32, 32), np.uint8)
                self.labels[name] = random.integers(0, 10, images).tolist()
                data = self.images[name].reshape(images, -1)
                content = {"data": data, "labels": self.labels[name]}
            (batches / name).write_bytes(pickle.dumps(content))
            md5s[name] = hashlib.md5((batches / name).read_bytes()).hexdigest()
        (batches / "readme.html").write_text("all about it")
        if tampered is not None:
            (batches / tampered).write_bytes(pickle.dumps(Bomb()))
        self.folder = batches
        self.archive = folder / "cifar-10-python.tar.gz"
        with tarfile.open(self.archive, "w:gz") as archive:
            archive.add(batches, "cifar-10-batches-py")
        self.md5 = hashlib.md5(self.archive.read_bytes()).hexdigest()

        self.known = dataclasses.replace(
            ARCHIVE,
            md5=self.md5,
            sha256=hashlib.sha256(self.archive.read_bytes()).hexdigest(),
            train={name: md5s[name] for name in names[:5]},
            test={"test_batch": md5s["test_batch"]},
            meta={"batches.meta": md5s["batches.meta"]},
        )

    def source(self, path: Path) -> Official:
        return Official(path, self.known)


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
    assert decoded.classes == CLASSES


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
    assert ARCHIVE.md5 == CIFAR10.tgz_md5
    assert (ARCHIVE.name, ARCHIVE.folder) == (CIFAR10.filename, CIFAR10.base_folder)
    assert [*ARCHIVE.train.items()] == [tuple(each) for each in CIFAR10.train_list]
    assert [*ARCHIVE.test.items()] == [tuple(each) for each in CIFAR10.test_list]
    assert ARCHIVE.meta == {CIFAR10.meta["filename"]: CIFAR10.meta["md5"]}
    assert ARCHIVE.names_key == CIFAR10.meta["key"]


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
    archive = ARCHIVE.download(tmp_path / "data")
    assert archive.read_bytes() == small.archive.read_bytes()
    assert {file.name for file in archive.parent.iterdir()} <= {
        archive.name,
        ".cifar-10-batches-py.lock",
    }
    assert ARCHIVE.download(tmp_path / "data") == archive  # there already


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
