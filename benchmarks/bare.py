"""The loops that a user would write: plain PyTorch, torchrun's DDP, plain Lightning.

Each is a process of its own: ``python -m benchmarks.bare loop FOLDER`` or, for DDP, ``torchrun
--nproc-per-node 2 -m benchmarks.bare loop FOLDER``. Their batches lie ready in memory, normalised
and never augmented, so a peer pays nothing for data. They print images a second by epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Settings:
    """What a loop trains with; what the project's flags of these names mean."""

    batch_size: int = 128
    device: str = "cpu"
    precision: str = "32"
    channels_last: bool = False
    compile: bool = False
    stem: str = "imagenet"
    fused: bool = False
    """The optimizer's update in one kernel."""
    tuned: bool = False
    """DDP as someone who knows it sets it: gradients are views of buckets, no buffers broadcast."""


def batches(folder: Path, chosen: Settings, rank: int, world_size: int) -> list[tuple[Any, Any]]:
    """This rank's part of every batch of an epoch, ready on the device."""
    from benchmarks.images import arrays

    size = chosen.batch_size
    pixels, labels = arrays(folder)
    kept = len(labels) * 9 // 10 // size * size  # as many as the project trains on
    ready = torch.from_numpy(pixels[:kept]).permute(0, 3, 1, 2).float().div_(255)
    ready = ((ready - 0.47) / 0.25).to(chosen.device).contiguous(memory_format=layout(chosen))
    answers = torch.from_numpy(labels[:kept]).to(chosen.device)
    each = size // world_size
    mine = slice(rank * each, (rank + 1) * each)
    parts = zip(ready.split(size), answers.split(size), strict=True)
    return [(images[mine].clone(), labels[mine].clone()) for images, labels in parts]


def layout(chosen: Settings) -> torch.memory_format:
    """How images lie in memory."""
    return torch.channels_last if chosen.channels_last else torch.contiguous_format


def loop(folder: Path, epochs: int, chosen: Settings) -> list[float]:
    """A plain loop, in DDP where torchrun started it; images a second by epoch, on rank 0."""
    from cifar_dist.model.resnet import resnet18

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    ready = batches(folder, chosen, rank, world_size)
    on_gpu = chosen.device != "cpu"
    model: nn.Module = resnet18(10, chosen.stem)
    model = model.to(chosen.device, memory_format=layout(chosen))  # type: ignore[call-overload]
    if chosen.compile:
        model.compile(dynamic=False)
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
        known = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
        model = nn.parallel.DistributedDataParallel(model, **(known if chosen.tuned else {}))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, weight_decay=1e-2, fused=chosen.fused
    )
    mixed = torch.autocast(chosen.device, torch.bfloat16, enabled=chosen.precision == "bf16-mixed")
    rates = []
    for _ in range(epochs):
        began = time.perf_counter()
        # Added up where they are: reading them would make a GPU wait at each step.
        total = torch.zeros((), device=chosen.device)
        right = torch.zeros((), dtype=torch.int64, device=chosen.device)
        for images, labels in ready:
            with mixed:
                logits = model(images)
                loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            right += (logits.argmax(1) == labels).sum()
        if on_gpu:
            torch.cuda.synchronize()
        rates.append(len(ready) * chosen.batch_size / (time.perf_counter() - began))
    if world_size > 1:
        torch.distributed.destroy_process_group()
    return rates if rank == 0 else []


def lightning(folder: Path, epochs: int, chosen: Settings) -> list[float]:
    """Lightning's Trainer without Ray, as its documentation shows it."""
    import lightning.pytorch as pl
    from torchvision.models import resnet18

    ready = batches(folder, chosen, 0, 1)
    rates: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = resnet18(num_classes=10)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            images, labels = batch
            loss = nn.functional.cross_entropy(self.model(images), labels)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=1e-2)

        def on_train_epoch_start(self) -> None:
            self.began = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            rates.append(len(ready) * chosen.batch_size / (time.perf_counter() - self.began))

    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    # A list would be several loaders to Lightning.
    trainer.fit(Module(), torch.utils.data.DataLoader(ready, batch_size=None))  # type: ignore[arg-type]
    return rates


def main() -> None:
    """Run one and print its rates as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=("loop", "lightning"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--settings", default="{}", help="of `Settings`, as JSON")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.backends.cudnn.benchmark = True
    run = loop if chosen.which == "loop" else lightning
    settings = Settings(**json.loads(chosen.settings))
    if rates := run(chosen.folder, chosen.epochs, settings):
        print(json.dumps(rates))


if __name__ == "__main__":
    main()
