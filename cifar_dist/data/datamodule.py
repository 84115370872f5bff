"""The LightningDataModule: global batches, cut into ranks' parts, made ready on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_dist.config import TrainConfig
from cifar_dist.data.cache import CachedDataset
from cifar_dist.data.order import batch_bounds, epoch_order, rank_slice
from cifar_dist.data.sources import LabelledImages
from cifar_dist.data.transforms import Augmentation, Draws, Normalisation

PADDING = -1
"""Label of an image that only fills up a rank's part and must not be counted."""


class Batch(NamedTuple):
    """A rank's part of a global batch: n images."""

    images: Tensor
    """``[n, 3, H, W]``: uint8 from the loader, normalised float32 on the device."""
    labels: Tensor
    """``[n]`` int64; `PADDING` where the image does not count."""
    global_size: int
    """Images in the global batch, over all ranks."""
    draws: Draws | None = None
    """What was drawn for the augmentation of training images."""


@dataclass(frozen=True)
class Share:
    """Which part of every global batch is this process's."""

    rank: int
    world_size: int


@dataclass
class TrainBatches:
    """A rank's part of every global batch of an epoch; iterate once an epoch.

    Lightning keeps its place in a checkpoint: the epoch that is gone on with begins there.
    """

    source: LabelledImages
    members: NDArray[np.int64]
    """Numbers of the images in ``source`` that are trained on."""
    augmentation: Augmentation
    seed: int
    batch_size: int
    share: Share
    epoch: Callable[[], int]
    """The 0-based epoch that is about to be gone through."""
    begin_at: int = 0
    """The batch that the next epoch begins with; the ones before it were trained on."""
    done: int = 0
    """Batches of the epoch that are over."""

    def __len__(self) -> int:
        return len(batch_bounds(len(self.members), self.batch_size)) - 1

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch()
        self.done, self.begin_at = self.begin_at, 0
        order = self.members[epoch_order(len(self.members), self.seed, epoch)]
        bounds = batch_bounds(len(order), self.batch_size)
        for start, stop in pairwise(bounds[self.done :]):
            self.done += 1
            mine = rank_slice(stop - start, self.share.rank, self.share.world_size)
            images = order[start:stop][mine]
            draws = self.augmentation.draw(
                self.seed, epoch, images, size=self.source.images.shape[-1]
            )
            yield _gathered(self.source, images, int(stop - start))._replace(draws=draws)

    def state_dict(self) -> dict[str, Any]:
        """Where in the epoch it is."""
        return {"done": self.done % len(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin there."""
        self.begin_at = state_dict["done"]


@dataclass(frozen=True)
class EvaluationBatches:
    """A rank's part of every global batch of images to evaluate, each image once over all ranks.

    Every rank gets equally many batches of equal size, as DDP's collectives need; what is
    missing to that is filled up with images whose label is `PADDING`.
    """

    source: LabelledImages
    members: NDArray[np.int64]
    batch_size: int
    share: Share

    def __len__(self) -> int:
        return len(batch_bounds(len(self.members), self.batch_size)) - 1

    def __iter__(self) -> Iterator[Batch]:
        bounds = batch_bounds(len(self.members), self.batch_size)
        for start, stop in pairwise(bounds):
            mine = rank_slice(stop - start, self.share.rank, self.share.world_size)
            images = self.members[start:stop][mine]
            missing = -(-int(stop - start) // self.share.world_size) - len(images)
            filled = np.concatenate([images, self.members[:1].repeat(missing)])
            batch = _gathered(self.source, filled, int(stop - start))
            batch.labels[len(images) :] = PADDING
            yield batch


def _gathered(source: LabelledImages, images: NDArray[np.int64], global_size: int) -> Batch:
    return Batch(
        images=torch.from_numpy(source.images.take(images, axis=0)),
        labels=torch.from_numpy(source.labels.take(images).astype(np.int64)),
        global_size=global_size,
    )


class ImageDataModule(pl.LightningDataModule):
    """Training, validation and test images as batches of normalised float32 on the device.

    The same global batches come whatever the number of ranks: which images, in which order,
    and how each is augmented depend on (seed, epoch, image) alone.

    Raises:
        UserError: on use with so many ranks that one would get fewer than 2 training images
            of some batch.
    """

    def __init__(self, config: TrainConfig, dataset: CachedDataset) -> None:
        super().__init__()
        assert config.flip is not None  # settled when the config was made
        self.config = config
        self.dataset = dataset
        self.augmentation = Augmentation(
            config.crop_padding, config.flip, config.cutout, config.crop_padding_mode
        )
        self.normalisation = Normalisation(dataset.mean, dataset.std, config.image_size)

    @property
    def share(self) -> Share:
        """This process's share, as the trainer has it."""
        if self.trainer is None:
            return Share(rank=0, world_size=1)
        return Share(self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> TrainBatches:
        self.dataset.check_batches(self.config.batch_size, self.share.world_size)
        images, members = self.dataset.part("train")
        return TrainBatches(
            images,
            members,
            self.augmentation,
            self.config.seed,
            self.config.batch_size,
            self.share,
            epoch=lambda: self.trainer.current_epoch if self.trainer else 0,
        )

    def val_dataloader(self) -> EvaluationBatches:
        return self._evaluated("val")

    def test_dataloader(self) -> EvaluationBatches:
        return self._evaluated("test")

    def _evaluated(self, split: str) -> EvaluationBatches:
        return EvaluationBatches(*self.dataset.part(split), self.config.batch_size, self.share)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """The batch as the network takes it; runs where the batch is."""
        assert isinstance(batch, Batch)
        return self.ready(batch)

    def ready(self, batch: Batch) -> Batch:
        """Bytes to float32 ``[n, 3, size, size]``, augmented where something was drawn."""
        images = batch.images
        if batch.draws is not None:
            images = self.augmentation.apply(images, batch.draws)
        images = self.normalisation.apply(images)
        if batch.draws is not None:
            images = self.augmentation.blank(images, batch.draws)
        images = self.normalisation.resize(images)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return batch._replace(images=images)
