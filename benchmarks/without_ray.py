"""The project's training under torchrun: what is left of its cost where Ray is not.

``torchrun --nproc-per-node 2 -m benchmarks.without_ray`` and the flags of ``cifar_dist.train``.
Each process is a rank of the run, as a Ray worker would be one: same data module, callbacks, DDP
settings and checkpoints. Used by `benchmarks.step`.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from cifar_dist.cli import parse_train
from cifar_dist.data.cache import prepare
from cifar_dist.data.datasets import find_source
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.training.buckets import fix_buckets
from cifar_dist.training.fit import fit
from cifar_dist.training.memory import threads_share_memory


class Torchrun(TorchElasticEnvironment):
    """torchrun's ranks; Lightning would expect as many devices as ranks in each process."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        pass


class FixedBuckets(DDPStrategy):
    """DDP as the project's workers have it, see `cifar_dist.cluster.strategy`."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")  # Lightning would look for one device a rank

    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        fix_buckets(self.model)


def main() -> None:
    """Train as one of torchrun's processes."""
    threads_share_memory()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config = parse_train(sys.argv[1:])
    rank = int(os.environ["RANK"])
    assert config.name is not None
    run = RunDirectory.at(config.storage_path, config.name)
    if rank == 0:
        run.begin(config)
    dataset = prepare(config.dataset, find_source(config.dataset, str(config.data_dir)))
    torch.distributed.init_process_group("gloo")
    strategy = FixedBuckets(broadcast_buffers=False, gradient_as_bucket_view=True)
    fit(config, run, dataset, rank=rank, strategy=strategy, plugins=[Torchrun()])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
