"""The same pixels wherever a worker's images lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.cache import prepare
from cifar_dist.data.datamodule import Batch, ImageDataModule
from cifar_dist.data.datasets import find_source
from cifar_dist.data.stores import DeviceImages, HostImages, ImageStore, make_store
from cifar_dist.errors import UserError

CPU = torch.device("cpu")
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
STORES = [DeviceImages, HostImages]


@pytest.fixture(scope="module")
def dataset():
    return prepare("digits", find_source("digits", "data"))


def batches_with(
    dataset, monkeypatch: pytest.MonkeyPatch, store: Callable[..., ImageStore], device: str
) -> list[Batch]:
    """What a worker on a device trains on in an epoch, and evaluates, with images in a store."""
    where = torch.device(device)
    monkeypatch.setattr(ImageDataModule, "device", where)
    monkeypatch.setattr(
        "cifar_dist.data.datamodule.make_store", lambda images, device, _: store(images, device)
    )
    config = TrainConfig(dataset="digits", flip=0.5, cutout=6, batch_size=130)
    module = ImageDataModule(config, dataset)
    loaders = (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())
    found = [module.ready(batch) for loader in loaders for batch in loader]
    assert all(batch.images.device.type == where.type for batch in found)
    return [b._replace(images=b.images.cpu(), labels=b.labels.cpu()) for b in found]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("store", STORES)
def test_every_store_gives_the_pixels_and_labels_of_the_mapped_file(
    dataset, monkeypatch: pytest.MonkeyPatch, store: Callable[..., ImageStore], device: str
) -> None:
    with monkeypatch.context() as patch:
        expected = batches_with(dataset, patch, HostImages, "cpu")
    found = batches_with(dataset, monkeypatch, store, device)
    assert len(found) == len(expected) == 11 + 2 + 3
    for mine, its in zip(found, expected, strict=True):
        # A GPU divides as a CPU does: both round each operation as IEEE 754 says.
        assert torch.equal(mine.images, its.images)
        assert torch.equal(mine.labels, its.labels)
        assert mine.global_size == its.global_size


def test_images_of_the_file_are_not_read_through_when_a_batch_is_taken(tmp_path: Path) -> None:
    # The last image alone is wanted; a copy of all of them would take a worker's memory.
    images = np.memmap(tmp_path / "images", np.uint8, "w+", shape=(1000, 3, 8, 8))
    images[999] = 7
    store = HostImages(images, CPU)
    (batch,) = store.batches([(np.array([999]), torch.tensor([999]))])
    assert batch.shape == (1, 3, 8, 8)
    assert batch.unique().tolist() == [7]


def test_without_a_gpu_images_stay_in_the_mapped_file(tmp_path: Path) -> None:
    images = np.memmap(tmp_path / "images", np.uint8, "w+", shape=(10, 3, 8, 8))
    assert isinstance(make_store(images, CPU, "auto"), HostImages)


@pytest.mark.parametrize(
    ("where", "free", "kind"),
    [
        ("auto", 4 * 19_200, DeviceImages),
        ("auto", 4 * 19_200 - 1, HostImages),
        ("on", 19_200, DeviceImages),
        ("off", 2**40, HostImages),
    ],
)
def test_images_go_to_the_gpu_where_they_fit(
    where: str, free: int, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The memory of a GPU that this machine may not have; nothing is sent there.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**40))
    monkeypatch.setattr("cifar_dist.data.stores.DeviceImages", lambda *_: DeviceImages)
    monkeypatch.setattr("cifar_dist.data.stores.HostImages", lambda *_: HostImages)
    images = np.zeros((100, 3, 8, 8), np.uint8)
    assert make_store(images, torch.device("cuda"), where) is kind


def test_more_images_than_the_gpu_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**40))
    images = np.zeros((2, 3, 1024, 1024), np.uint8)
    with pytest.raises(UserError, match=r"--data-on-device on: the images take 6 MiB.*1 MiB free"):
        make_store(images, torch.device("cuda"), "on")


def test_data_on_device_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="--data-on-device on: needs --use-gpu"):
        TrainConfig(data_on_device="on")
