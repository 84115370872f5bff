"""An evaluation on Ray: workers share the images, the driver concatenates their logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from cifar_dist.cluster.resources import worker_resources
from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import RunFailed, UserError


@dataclass(frozen=True)
class Work:
    """The arguments of a worker."""

    config: TrainConfig
    """Settings of the network, and of where it runs."""
    dataset_fingerprint: str
    where: str
    """The weights' file, for messages."""
    weights: bytes
    """A safetensors file."""
    split: str
    batch_size: int


def logits_on_ray(work: Work) -> NDArray[np.float32]:
    """Compute ``[n, classes]`` logits of a split on the cluster that this process is connected to.

    Raises:
        UserError: a worker's node has no such data, or no GPU.
        RunFailed: a worker failed, and so did the retries of its task.
    """
    # Stored once: passed by value, the weights would be stored again for each worker's task.
    given = ray.put(work)
    reserved = worker_resources(work.config)
    task = ray.remote(num_cpus=reserved["CPU"], num_gpus=reserved.get("GPU", 0))(_share)
    world_size = work.config.max_workers
    parts = [task.remote(given, rank, world_size) for rank in range(world_size)]
    try:
        # By rank, in whichever order the tasks end: a rank's batches follow those of the rank
        # before, so the rows line up with the split's images.
        return np.concatenate(ray.get(parts))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise RunFailed(str(error)) from None
    except ray.exceptions.RayError as error:
        raise RunFailed(f"a worker was lost ({error})") from None


def _share(work: Work, rank: int, world_size: int) -> Any:
    from safetensors.torch import load

    from cifar_dist.data.cache import prepare_same
    from cifar_dist.inference.sharded import split_logits

    config = work.config
    assert config.data_dir is not None  # resolved when the config was made
    dataset = prepare_same(config.dataset, config.data_dir, work.dataset_fingerprint)
    return split_logits(
        work.where, load(work.weights), config, dataset, work.split, work.batch_size, rank,
        world_size,
    )  # fmt: skip
