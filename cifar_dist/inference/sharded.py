"""From a model and images to logits, in batches: the one way of evaluate, predict and report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.cache import CachedDataset
from cifar_dist.data.order import batch_bounds, rank_slice
from cifar_dist.inference.model import TrainedModel, load_trained

Logits = Callable[[Tensor], Tensor]
"""A function from ``[n, 3, H, W]`` bytes to ``[n, classes]`` logits on the CPU."""


def batched_logits(
    model: Logits,
    images: NDArray[np.uint8],
    batch_size: int,
    members: NDArray[np.int64] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[NDArray[np.float32]]:
    """Yield ``[n, classes]`` logits of a worker's batches, in order.

    Batches are the same whatever the number of workers, so that logits are the same bits: each
    worker computes some of the batches, whole.

    Args:
        model: computes a batch.
        images: ``[all, 3, H, W]``, read a batch at a time.
        batch_size: images that are computed at once.
        members: which of the images, in which order; all of them by default.
        rank: the worker's.
        world_size: number of workers.
    """
    members = np.arange(len(images)) if members is None else members
    bounds = batch_bounds(len(members), batch_size)
    mine = rank_slice(len(bounds) - 1, rank, world_size)
    for start, stop in list(pairwise(bounds))[mine]:
        batch = torch.from_numpy(images.take(members[start:stop], axis=0))
        with torch.inference_mode():
            logits = model(batch)
        yield logits.numpy()


def shard_logits(
    model: TrainedModel,
    dataset: CachedDataset,
    split: str,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> NDArray[np.float32]:
    """Return ``[n, classes]`` logits of a worker's part of a split; all parts in order are it."""
    images, members = dataset.part(split)
    none = np.empty((0, len(dataset.classes)), np.float32)  # a worker may have no batch
    found = batched_logits(model.logits, images.images, batch_size, members, rank, world_size)
    return np.concatenate([none, *found])


def split_logits(
    where: str,
    weights: Mapping[str, Tensor],
    config: TrainConfig,
    dataset: CachedDataset,
    split: str,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> NDArray[np.float32]:
    """Load a model on this process's device and return its logits, see `shard_logits`.

    Args:
        where: the weights' file, for messages.
        weights: by name.
        config: the network's, and where and how it is computed.

    Raises:
        UserError: as `load_trained`.
    """
    model = load_trained(where, weights, config, dataset.about)
    return shard_logits(model, dataset, split, batch_size, rank, world_size)
