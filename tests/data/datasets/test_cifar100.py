"""CIFAR-100 from its archive and from Parquet files, trained on by its name."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torchvision.datasets import CIFAR100

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.datasets import find_source
from cifar_dist.data.datasets.cifar100 import ARCHIVE
from cifar_dist.data.datasets.official import Official
from cifar_dist.errors import UserError
from tests.conftest import encoded

NAMES = [f"fine {number}" for number in range(100)]


def test_the_archive_is_torchvisions() -> None:
    assert (ARCHIVE.md5, ARCHIVE.name, ARCHIVE.folder) == (
        CIFAR100.tgz_md5, CIFAR100.filename, CIFAR100.base_folder,
    )  # fmt: skip
    assert ARCHIVE.reader() is CIFAR100
    assert [*ARCHIVE.train.items()] == [tuple(each) for each in CIFAR100.train_list]
    assert [*ARCHIVE.test.items()] == [tuple(each) for each in CIFAR100.test_list]
    assert ARCHIVE.meta == {CIFAR100.meta["filename"]: CIFAR100.meta["md5"]}
    assert ARCHIVE.names_key == CIFAR100.meta["key"]


def test_the_archive_decodes_to_its_fine_labels(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    folder = tmp_path / ARCHIVE.folder
    folder.mkdir()
    images = {name: random.integers(0, 256, (5, 3, 32, 32), np.uint8) for name in ("train", "test")}
    labels = {"train": [0, 99, 42, 7, 99], "test": [98, 1, 2, 3, 4]}
    md5s = {}
    for name in ("train", "test", "meta"):
        content = {"fine_label_names": NAMES}
        if name != "meta":
            data = images[name].reshape(5, -1)
            content = {"data": data, "fine_labels": labels[name], "coarse_labels": [0] * 5}
        (folder / name).write_bytes(pickle.dumps(content))
        md5s[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    packed = tmp_path / ARCHIVE.name
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(folder, ARCHIVE.folder)

    known = dataclasses.replace(
        ARCHIVE, train={"train": md5s["train"]}, test={"test": md5s["test"]},
        meta={"meta": md5s["meta"]},
    )  # fmt: skip
    for path in (packed, folder):
        decoded = Official(path, known).decode()
        assert np.array_equal(decoded.train.images, images["train"])
        assert decoded.train.labels.tolist() == labels["train"]
        assert decoded.test.labels.tolist() == labels["test"]
        assert decoded.classes == tuple(NAMES)


def write_parquet(file: Path, count: int) -> None:
    random = np.random.default_rng(count)
    cells = [
        {"bytes": encoded(image)} for image in random.integers(0, 256, (count, 32, 32, 3), np.uint8)
    ]
    fine = pa.array(np.arange(count) % 100)
    pq.write_table(pa.table({"img": cells, "fine_label": fine, "coarse_label": fine}), file)


def test_it_is_trained_on_by_its_name(tmp_path: Path) -> None:
    pytest.importorskip("tyro")  # of the command line
    from cifar_dist.train import train

    write_parquet(tmp_path / "train-00000-of-00001.parquet", 200)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", 100)
    config = TrainConfig(
        dataset="cifar100", data_dir=str(tmp_path), num_workers=0, max_epochs=1, batch_size=60,
        storage_path=str(tmp_path / "runs"), report=False,
    )  # fmt: skip
    run = train(config).run
    assert run.name.startswith("cifar100-")
    assert len((run.trained_on() or {})["classes"]) == 100


def test_other_columns_are_refused(small_parquet: Path) -> None:
    with pytest.raises(UserError, match="has columns img, label; needs img or image, and fine_"):
        find_source("cifar100", small_parquet)
