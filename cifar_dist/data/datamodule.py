"""The LightningDataModule: global batches, cut into ranks' parts, made ready on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_dist.config.checks import check_image_side
from cifar_dist.config.train import TrainConfig
from cifar_dist.data.cache import CachedDataset
from cifar_dist.data.datasets import LabelledImages
from cifar_dist.data.order import batch_bounds, epoch_order, rank_slice
from cifar_dist.data.stores import ImageStore, make_store, to_device
from cifar_dist.data.transforms import Augmentation, Cutout, Normalisation
from cifar_dist.registry import AUGMENTATIONS

PADDING = -1
"""Label of an image that only fills up a rank's part and must not be counted."""


class Batch(NamedTuple):
    """A rank's part of a global batch: n images, on the device."""

    images: Tensor
    """``[n, C, H, W]``: uint8 from the loader, normalised float32 for the network."""
    labels: Tensor
    """``[n]`` int64; `PADDING` where the image does not count."""
    global_size: int
    """Images in the global batch, over all ranks."""
    draws: tuple[Tensor, ...] = ()
    """``[columns, n]`` of each augmentation: what was drawn for training images."""


@dataclass(frozen=True)
class Shard:
    """This process's part of every global batch."""

    rank: int
    world_size: int


@dataclass
class TrainBatches:
    """A rank's part of every global batch of an epoch; iterate once an epoch.

    The order and all draws of an epoch go to the device as one table, so that a batch is an index
    into it. Lightning keeps the position in a checkpoint: the epoch that is resumed begins there.
    """

    store: ImageStore
    members: NDArray[np.int64]
    """Numbers of the images that are trained on."""
    labels: NDArray[np.integer[Any]]
    """``[all]`` labels of all images of the source."""
    image_side: int
    """Of the source's images, in pixels."""
    augmentations: tuple[Augmentation, ...]
    """In the order of their draws in a batch."""
    seed: int
    batch_size: int
    """Global."""
    shard: Shard
    epoch: Callable[[], int]
    """The 0-based epoch that is about to begin."""
    begin_at: int = 0
    """The batch that the next epoch begins with; earlier ones were trained on."""
    done: int = 0
    """Batches of the epoch that are over."""

    def __len__(self) -> int:
        return len(batch_bounds(len(self.members), self.batch_size)) - 1

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch()
        # Reset, so that only the epoch that is resumed begins late.
        self.done, self.begin_at = self.begin_at, 0
        order = self.members[epoch_order(len(self.members), self.seed, epoch)]
        # Drawn for all images and put in order afterwards: a draw depends on the image, not on its
        # place in the epoch or on the rank that computes it.
        drawn = [
            each.draw(self.seed, epoch, len(self.labels), self.image_side)[:, order]
            for each in self.augmentations
        ]
        widths = [each.columns for each in self.augmentations]
        columns = np.concatenate([order[None], self.labels[order][None], *drawn], dtype=np.int64)
        table = to_device(columns, self.store.device)
        cuts = []
        for start, stop in pairwise(batch_bounds(len(order), self.batch_size)[self.done :]):
            mine = rank_slice(int(stop - start), self.shard.rank, self.shard.world_size)
            cuts.append((slice(start + mine.start, start + mine.stop), int(stop - start)))
        parts = ((columns[0, mine], table[0, mine]) for mine, _ in cuts)
        for (mine, size), images in zip(cuts, self.store.batches(parts), strict=True):
            # Counted before it is handed out: a checkpoint at the end of its step must not repeat
            # it.
            self.done += 1
            yield Batch(images, table[1, mine], size, table[2:, mine].split(widths))

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch."""
        # At an epoch's end all batches are done, and the next epoch begins with the first.
        return {"done": self.done % len(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Have the next epoch begin there."""
        self.begin_at = state_dict["done"]


@dataclass
class EvaluationBatches:
    """A rank's part of every global batch of images to evaluate, each image once over all ranks.

    Every rank gets equally many batches of equal size, as DDP's collectives need; what is
    missing to that is filled up with images whose label is `PADDING`.
    """

    store: ImageStore
    members: NDArray[np.int64]
    labels: NDArray[np.integer[Any]]
    """``[all]`` labels of all images of the source."""
    batch_size: int
    """Global."""
    shard: Shard

    def __len__(self) -> int:
        return len(batch_bounds(len(self.members), self.batch_size)) - 1

    def __iter__(self) -> Iterator[Batch]:
        columns, table = self._tables
        bounds = batch_bounds(len(self.members), self.batch_size)
        sizes = [int(stop - start) for start, stop in pairwise(bounds)]
        ends = np.cumsum([self._each(size) for size in sizes]).tolist()
        cuts = [slice(start, stop) for start, stop in pairwise([0, *ends])]
        parts = ((columns[0, mine], table[0, mine]) for mine in cuts)
        for mine, size, images in zip(cuts, sizes, self.store.batches(parts), strict=True):
            yield Batch(images, table[1, mine], size)

    def _each(self, size: int) -> int:
        """Return each rank's images of a global batch of ``size``, `PADDING` among them."""
        return -(-size // self.shard.world_size)

    @functools.cached_property
    def _tables(self) -> tuple[NDArray[np.int64], Tensor]:
        """Return this rank's numbers and labels, batch after batch; made and sent once."""
        numbers, labels = [], []
        for start, stop in pairwise(batch_bounds(len(self.members), self.batch_size)):
            mine = rank_slice(int(stop - start), self.shard.rank, self.shard.world_size)
            images = self.members[start:stop][mine]
            missing = self._each(int(stop - start)) - len(images)
            # Any image serves as padding, since its label keeps it from being counted.
            numbers += [images, self.members[:1].repeat(missing)]
            labels += [self.labels[images], np.full(missing, PADDING)]
        columns = np.stack([np.concatenate(numbers), np.concatenate(labels).astype(np.int64)])
        return columns, to_device(columns, self.store.device)


class ImageDataModule(pl.LightningDataModule):
    """Training, validation and test images as batches of normalised float32 on the device.

    The same global batches come whatever the number of ranks: which images, in which order,
    and how each is augmented depend on (seed, epoch, image) alone.

    Raises:
        UserError: on use, with settings that do not fit the images' size, or so many ranks that
            one would get fewer than 2 training images of some batch.
    """

    def __init__(self, config: TrainConfig, dataset: CachedDataset) -> None:
        super().__init__()
        self.config = config
        self.dataset = dataset
        self.augmentation: Augmentation = AUGMENTATIONS[config.augment](config)
        self.cutout = Cutout(config.cutout)
        self.normalisation = Normalisation(dataset.mean, dataset.std, config.image_size)
        self._stores: dict[tuple[int, torch.device], ImageStore] = {}

    @property
    def shard(self) -> Shard:
        """The part of this process, as the trainer has it."""
        if self.trainer is None:
            return Shard(rank=0, world_size=1)
        return Shard(self.trainer.global_rank, self.trainer.world_size)

    @property
    def device(self) -> torch.device:
        """The device that batches are made on."""
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def train_dataloader(self) -> TrainBatches:
        check_image_side(self.config, self.dataset.image_side)
        self.dataset.check_batches(self.config.batch_size, self.shard.world_size)
        images, members = self.dataset.part("train")
        return TrainBatches(
            self._store(images),
            members,
            images.labels,
            self.dataset.image_side,
            (self.augmentation, self.cutout),
            self.config.seed,
            self.config.batch_size,
            self.shard,
            # Asked for at each epoch's start: Lightning makes the loader once for all epochs.
            epoch=lambda: self.trainer.current_epoch if self.trainer else 0,
        )

    def val_dataloader(self) -> EvaluationBatches:
        return self._evaluated("val")

    def test_dataloader(self) -> EvaluationBatches:
        return self._evaluated("test")

    def _evaluated(self, split: str) -> EvaluationBatches:
        images, members = self.dataset.part(split)
        batch_size = self.config.batch_size
        return EvaluationBatches(
            self._store(images), members, images.labels, batch_size, self.shard
        )

    def _store(self, images: LabelledImages) -> ImageStore:
        """Return the store of a source, which training and validation images share."""
        assert isinstance(images.images, np.memmap)
        # Each call of `part` maps the file anew: the place in it identifies a source, where the
        # array's own identity would fill the device once for training and once for validation.
        key = (images.images.offset, self.device)
        if key not in self._stores:
            where = self.config.data_on_device
            self._stores[key] = make_store(images.images, self.device, where)
        return self._stores[key]

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Leave the batch where the loader put it: on the device."""
        assert isinstance(batch, Batch)
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """Return the batch as the network takes it; runs where the batch is."""
        assert isinstance(batch, Batch)
        return self.ready(batch)

    def ready(self, batch: Batch) -> Batch:
        """Turn bytes into float32 ``[n, C, size, size]``, augmented where something was drawn."""
        images = batch.images
        if batch.draws:
            # While they are bytes: a gather moves a quarter of what it would in float32.
            images = self.augmentation.apply(images, batch.draws[0])
        images = self.normalisation.apply(images)
        if batch.draws:
            # After normalisation, where the zeros that it writes are the mean colour.
            images = self.cutout.apply(images, batch.draws[1])
        images = self.normalisation.resize(images)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return batch._replace(images=images)
