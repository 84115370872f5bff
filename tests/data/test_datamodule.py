"""Global batches are the same whatever the number of workers, and no image counts twice."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.cache import prepare
from cifar_dist.data.datamodule import PADDING, Batch, ImageDataModule, Shard
from cifar_dist.data.datasets import find_source
from cifar_dist.data.datasets.parquet import find_parquet
from cifar_dist.data.philox import Stream, below, random_words
from cifar_dist.data.transforms import Augmentation
from cifar_dist.errors import UserError
from cifar_dist.registry import AUGMENTATIONS
from tests.conftest import write_parquet


@pytest.fixture(scope="module")
def dataset():
    return prepare("digits", find_source("digits", "data"))


def module_of(
    dataset, rank: int = 0, world_size: int = 1, augment: str = "crop-flip", **settings
) -> ImageDataModule:
    settings = {"dataset": "digits", "flip": 0.5, "cutout": 6, "batch_size": 130, **settings}

    class OfRank(ImageDataModule):
        shard = Shard(rank, world_size)

    config = TrainConfig(**settings)
    # Unchecked: the choices were made of the registry before a test adds to it.
    object.__setattr__(config, "augment", augment)
    return OfRank(config, dataset)


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


class Rolled(Augmentation):
    """A toy: shifts each image to the right by a number of columns from 0 to 2, the rest around."""

    columns = 1

    def __init__(self, config: TrainConfig) -> None:
        self.bound = config.crop_padding

    def draw(self, seed: int, epoch: int, images: int, side: int) -> np.ndarray:
        return below(random_words(seed, Stream.AUGMENTATION, epoch, images, words=1), self.bound).T

    def apply(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        return torch.stack([each.roll(int(n), -1) for each, n in zip(images, *draws, strict=True)])


@pytest.fixture
def _rolled(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_places", "_loaded"):
        monkeypatch.setattr(AUGMENTATIONS, name, dict(getattr(AUGMENTATIONS, name)))
    AUGMENTATIONS.register("rolled", Rolled)


@pytest.mark.usefixtures("_rolled")
def test_a_registered_augmentation_is_used_by_its_name(dataset) -> None:
    settings = {"crop_padding": 3, "cutout": 0}
    plain, rolled = (
        epoch_of(module_of(dataset, augment=name, **settings), 1) for name in ("none", "rolled")
    )
    by = [0, 0, 0]
    for before, after in zip(plain, rolled, strict=True):
        assert torch.equal(before.labels, after.labels)
        for image, shifted in zip(before.images, after.images, strict=True):
            by[next(n for n in range(3) if torch.equal(image.roll(n, -1), shifted))] += 1
    assert min(by) > 400 < sum(by) == 1_350
    alone = global_digests(dataset, 1, epoch=2, augment="rolled")
    assert alone == global_digests(dataset, 3, epoch=2, augment="rolled")
    assert alone != global_digests(dataset, 1, epoch=3, augment="rolled")


def test_without_augmentation_cutout_still_applies(dataset) -> None:
    def shown(**settings) -> torch.Tensor:
        return torch.cat([b.images for b in epoch_of(module_of(dataset, **settings), 0)])

    plain, cut = (shown(augment="none", cutout=cutout) for cutout in (0, 6))
    assert torch.equal(plain, shown(crop_padding=0, flip=0.0, cutout=0))
    changed = (plain != cut).any(dim=1)
    assert (cut.amax(dim=1)[changed] == 0).all()
    assert changed.flatten(1).sum(dim=1).max() == 36


def test_300_classes_arrive_whole(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(300), 4))
    images = np.zeros((len(labels), 8, 8, 3), np.uint8)
    images[:, :, :, 0] = (labels // 2)[:, None, None]  # so that each image says its label
    images[:, :, :, 1] = (labels % 2)[:, None, None]
    images[:, 1, 1, 2], images[:, 1, 2, 2] = np.divmod(np.arange(len(labels)), 256)  # all differ
    for split in ("train", "test"):
        images[:, 2, 2, 2] = split == "test"
        write_parquet(tmp_path / f"{split}.parquet", images, labels)
    dataset = prepare("many", find_parquet(tmp_path))
    assert dataset.classes == tuple(map(str, range(300)))
    assert (dataset.image_side, dataset.channels) == (8, 3)
    module = module_of(dataset, crop_padding=0, flip=0.0, cutout=0, image_size=8)
    mean, std = (torch.tensor(each).view(-1, 1, 1) * 255 for each in (dataset.mean, dataset.std))

    def said(batch: Batch) -> torch.Tensor:
        assert batch.images.shape[1:] == (3, 8, 8)
        red, green, _ = (batch.images * std + mean)[:, :, 0, 0].round().long().T
        return 2 * red + green

    seen = []
    for batches in (epoch_of(module, 0), map(module.ready, module.val_dataloader())):
        for batch in batches:
            assert torch.equal(said(batch), batch.labels)
            seen += batch.labels.tolist()
    assert sorted(seen) == sorted(labels.tolist())
    tested = torch.cat([batch.labels for batch in module.test_dataloader()])
    assert tested.tolist() == labels.tolist()


def test_a_crop_wider_than_the_images_is_refused(dataset) -> None:
    with pytest.raises(UserError, match="--crop-padding 33: images are 32 pixels wide"):
        module_of(dataset, crop_padding=33).train_dataloader()


def test_images_come_in_the_size_and_memory_order_asked_for(dataset) -> None:
    module = module_of(dataset, image_size=48, channels_last=True)
    batch = module.ready(next(iter(module.train_dataloader())))
    assert batch.images.shape == (130, 3, 48, 48)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
