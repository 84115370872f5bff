"""Global batches are the same whatever the number of workers, and no image counts twice."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.cache import prepare
from cifar_dist.data.datamodule import PADDING, Batch, ImageDataModule, Shard
from cifar_dist.data.datasets import find_source


@pytest.fixture(scope="module")
def dataset():
    return prepare("digits", find_source("digits", "data"))


def module_of(dataset, rank: int = 0, world_size: int = 1, **settings) -> ImageDataModule:
    settings = {"dataset": "digits", "flip": 0.5, "cutout": 6, "batch_size": 130, **settings}

    class OfRank(ImageDataModule):
        shard = Shard(rank, world_size)

    return OfRank(TrainConfig(**settings), dataset)


def epoch_of(module: ImageDataModule, epoch: int) -> list[Batch]:
    batches = dataclasses.replace(module.train_dataloader(), epoch=lambda: epoch)
    return [module.ready(batch) for batch in batches]


def global_digests(dataset, world_size: int, epoch: int, **settings) -> list[str]:
    """A SHA-256 of the pixels and labels of each global batch, put together from the ranks'."""
    ranks = [
        epoch_of(module_of(dataset, rank, world_size, **settings), epoch)
        for rank in range(world_size)
    ]
    digests = []
    for parts in zip(*ranks, strict=True):
        images = torch.cat([part.images for part in parts]).contiguous()
        labels = torch.cat([part.labels for part in parts])
        assert len(images) == parts[0].global_size
        digests.append(
            hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        )
    return digests


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_global_batch_holds_the_same_pixels(dataset, world_size: int) -> None:
    alone = global_digests(dataset, 1, epoch=2)
    assert len(alone) == len(set(alone)) == 11
    assert global_digests(dataset, world_size, epoch=2) == alone
    assert global_digests(dataset, world_size, epoch=3) != alone
    assert global_digests(dataset, world_size, epoch=2, seed=1) != alone


def test_an_epoch_shows_every_training_image_once(dataset) -> None:
    plain = {"crop_padding": 0, "flip": 0.0, "cutout": 0}
    module = module_of(dataset, **plain)
    shown = torch.cat([batch.images for batch in epoch_of(module, 0)])
    again = torch.cat([batch.images for batch in epoch_of(module, 1)])
    assert len(shown) == dataset.train_images == 1_350
    assert not torch.equal(shown, again)
    as_rows = [np.sort(each.flatten(1).double().sum(1).numpy()) for each in (shown, again)]
    np.testing.assert_array_equal(*as_rows)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("split", "count"), [("val", 150), ("test", 297)])
def test_evaluation_counts_every_image_once(dataset, split, count, world_size: int) -> None:
    assert count % world_size != 0 or world_size in (1, 2, 3)  # some do not divide
    sizes, counted = [], []
    for rank in range(world_size):
        module = module_of(dataset, rank, world_size)
        batches = list(getattr(module, f"{split}_dataloader")())
        assert len(batches) == len(getattr(module, f"{split}_dataloader")())
        sizes.append([len(batch.labels) for batch in batches])
        for batch in batches:
            counted += list(batch.images[batch.labels != PADDING].flatten(1).numpy())
    # Ranks with fewer or smaller batches would hang the others in DDP.
    assert all(size == sizes[0] for size in sizes)
    whole = [
        b.images.flatten(1).numpy() for b in getattr(module_of(dataset), f"{split}_dataloader")()
    ]
    expected = np.concatenate(whole)
    assert len(counted) == len(expected) == count
    assert sorted(row.tobytes() for row in counted) == sorted(row.tobytes() for row in expected)


def test_training_validation_and_test_images_are_apart(dataset) -> None:
    train, validation = (set(dataset.part(name)[1].tolist()) for name in ("train", "val"))
    assert not train & validation
    assert len(train | validation) == dataset.original_images
    test_images, members = dataset.part("test")
    assert len(test_images.images) == len(members) == dataset.test_images
    assert not np.shares_memory(test_images.images, dataset.part("train")[0].images)


def test_batches_are_normalised_with_the_training_images_statistics(dataset) -> None:
    module = module_of(dataset, crop_padding=0, flip=0.0, cutout=0)
    shown = torch.cat([module.ready(batch).images for batch in module.train_dataloader()])
    held_out = torch.cat([module.ready(batch).images for batch in module.val_dataloader()])
    both = torch.cat([shown, held_out])
    assert both.mean().item() == pytest.approx(0, abs=1e-4)
    assert both.std().item() == pytest.approx(1, abs=1e-3)


def test_images_come_in_the_size_and_memory_order_asked_for(dataset) -> None:
    module = module_of(dataset, image_size=48, channels_last=True)
    batch = module.ready(next(iter(module.train_dataloader())))
    assert batch.images.shape == (130, 3, 48, 48)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
