"""How far the losses of one worker and of two are apart, step by step, in float32.

``python -m benchmarks.workers_agree`` trains ResNet-18 for 50 steps as one process and as two (DDP
over gloo, a thread each), on the same global batches, with and without ``--sync-batchnorm``, and
prints the largest relative difference of the losses, and whether the weights are the same bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

STEPS = 50


def one_rank(rank: int, world_size: int, folder: str, settings: dict[str, Any]) -> None:
    """Train; rank 0 leaves the global batches' losses and a digest of the weights."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import nn

    from cifar_dist.config.train import make_config
    from cifar_dist.data.cache import prepare
    from cifar_dist.data.datamodule import ImageDataModule, Shard
    from cifar_dist.data.datasets import find_source
    from cifar_dist.model.optim import make_optimizer
    from cifar_dist.model.resnet import resnet18
    from cifar_dist.model.seeding import set_seed
    from cifar_dist.model.synchronized import synchronize
    from cifar_dist.training.weights import weights_as_bytes

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    config = make_config(settings)
    dataset = prepare(config.dataset, find_source(config.dataset, str(config.data_dir)))
    images = ImageDataModule(config, dataset)
    set_seed(config.seed)  # the same on both ranks here, so that no weights need be sent
    network = resnet18(10)
    if config.sync_batchnorm:
        synchronize(network)
    optimizer = make_optimizer(network, config)
    model = nn.parallel.DistributedDataParallel(
        network, broadcast_buffers=False, gradient_as_bucket_view=True
    )
    loader = dataclasses.replace(images.train_dataloader(), shard=Shard(rank, world_size))
    batches = itertools.chain.from_iterable(
        dataclasses.replace(loader, epoch=lambda epoch=epoch: epoch) for epoch in range(STEPS)
    )
    losses = []
    for batch in itertools.islice(batches, STEPS):
        ready = images.ready(batch)
        loss = F.cross_entropy(model(ready.images), ready.labels, reduction="sum")
        (loss * (world_size / ready.global_size)).backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().double()
        dist.all_reduce(total)
        losses.append(float(total) / ready.global_size)
    if rank == 0:
        digest = hashlib.sha256(weights_as_bytes(network)).hexdigest()
        Path(folder, "result.json").write_text(json.dumps([losses, digest]))
    dist.destroy_process_group()


def trained(world_size: int, settings: dict[str, Any]) -> tuple[list[float], str]:
    """Losses by step, and a digest of the weights."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_rank, (world_size, folder, settings), nprocs=world_size)
        losses, digest = json.loads(Path(folder, "result.json").read_text())
        return losses, digest


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    output = Path("benchmarks/results/workers_agree.json")
    parser.add_argument("--output", type=Path, default=output)
    chosen = parser.parse_args()
    rows = []
    print("| images | batch normalisation | step 2 | step 10 | largest of 50 | same weights |")
    print("|---|---|---|---|---|---|", flush=True)
    for dataset, sync in itertools.product(("digits", "cifar10"), (False, True)):
        settings = {"dataset": dataset, "sync_batchnorm": sync}
        (one, of_one), (two, of_two) = (trained(count, settings) for count in (1, 2))
        apart = [abs(b - a) / a for a, b in zip(one, two, strict=True)]
        rows.append({**settings, "relative": apart, "same weights": of_one == of_two})
        print(
            f"| {dataset} | {'--sync-batchnorm' if sync else 'by worker'} | {apart[1]:.0e} | "
            f"{apart[9]:.0e} | {max(apart):.1e} | {'yes' if of_one == of_two else 'no'} |",
            flush=True,
        )
        chosen.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
