"""One worker's whole part in an evaluation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from cifar_dist.data.cache import CachedDataset
from cifar_dist.data.datamodule import Shard
from cifar_dist.data.order import batch_bounds, rank_slice
from cifar_dist.inference.model import TrainedModel


def shard_logits(
    model: TrainedModel, dataset: CachedDataset, split: str, batch_size: int, shard: Shard
) -> NDArray[np.float32]:
    """``[n, classes]`` logits of a worker's part of a split.

    All workers' parts, one behind the other, make up the split. Batches are the same whatever the
    number of workers: each does some of them, whole.
    """
    images, members = dataset.part(split)
    bounds = batch_bounds(len(members), batch_size)
    mine = rank_slice(len(bounds) - 1, shard.rank, shard.world_size)
    parts = [
        model.logits(torch.from_numpy(images.images.take(members[start:stop], axis=0)))
        for start, stop in list(pairwise(bounds))[mine]
    ]
    return torch.cat(parts).numpy() if parts else np.empty((0, len(dataset.classes)), np.float32)
