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
from pathlib import Path
from typing import Any

import torch
from torch import nn

BATCH = 128


def batches(folder: Path, rank: int, world_size: int) -> list[tuple[Any, Any]]:
    """This rank's part of every batch of an epoch, ready."""
    from benchmarks.images import arrays

    pixels, labels = arrays(folder)
    kept = len(labels) * 9 // 10 // BATCH * BATCH  # as many as the project trains on
    ready = torch.from_numpy(pixels[:kept]).permute(0, 3, 1, 2).float().div_(255)
    ready = (ready - 0.47) / 0.25
    parts = zip(ready.split(BATCH), torch.from_numpy(labels[:kept]).split(BATCH), strict=True)
    each = BATCH // world_size
    mine = slice(rank * each, (rank + 1) * each)
    return [(images[mine].contiguous(), answers[mine]) for images, answers in parts]


def loop(folder: Path, epochs: int) -> list[float]:
    """A plain loop, in DDP where torchrun started it; images a second by epoch, on rank 0."""
    from torchvision.models import resnet18

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    ready = batches(folder, rank, world_size)
    model: nn.Module = resnet18(num_classes=10)
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    rates = []
    for _ in range(epochs):
        began = time.perf_counter()
        total, right = 0.0, 0
        for images, labels in ready:
            logits = model(images)
            loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            right += int((logits.argmax(1) == labels).sum())
        rates.append(len(ready) * BATCH / (time.perf_counter() - began))
    if world_size > 1:
        torch.distributed.destroy_process_group()
    return rates if rank == 0 else []


def lightning(folder: Path, epochs: int) -> list[float]:
    """Lightning's Trainer without Ray, as its documentation shows it."""
    import lightning.pytorch as pl
    from torchvision.models import resnet18

    ready = batches(folder, 0, 1)
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
            rates.append(len(ready) * BATCH / (time.perf_counter() - self.began))

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
    parser.add_argument("--deterministic", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    run = loop if chosen.which == "loop" else lightning
    if rates := run(chosen.folder, chosen.epochs):
        print(json.dumps(rates))


if __name__ == "__main__":
    main()
