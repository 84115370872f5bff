"""What a step costs the host: training a network of nothing, so that all else shows.

``python -m benchmarks.host loop|lightning|project`` trains one vector of ten numbers on digits in
batches of 8, with one thread and fused AdamW: as a bare loop and in Lightning's own, both on
batches that lie ready, and as the project without Ray, which augments and counts besides. It prints
milliseconds a step, by epoch, as JSON. Used by `benchmarks.step`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 8
STEPS = 169
"""Of an epoch of 1,350 training images."""
EPOCHS = 20


class Nothing(nn.Module):
    """Takes images, and returns its ten weights as every image's logits."""

    def __init__(self, *ignored: Any) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(10))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :10] * 0 + self.weights


def loop() -> list[float]:
    """A bare loop that counts loss and accuracy."""
    network = Nothing()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.arange(BATCH)
    found = []
    for _ in range(EPOCHS):
        began = time.perf_counter()
        total, right = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        for _ in range(STEPS):
            logits = network(images)
            loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            right += (logits.argmax(1) == labels).sum()
        found.append(1000 * (time.perf_counter() - began) / STEPS)
    return found


def lightning() -> list[float]:
    """The same body in Lightning's loop, with all that can be switched off switched off."""
    import lightning.pytorch as pl

    found: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = Nothing()

        def on_train_epoch_start(self) -> None:
            self.total, self.right = torch.zeros(()), torch.zeros((), dtype=torch.int64)
            self.began = time.perf_counter()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            images, labels = batch
            logits = self.network(images)
            loss = nn.functional.cross_entropy(logits, labels)
            self.total += loss.detach()
            self.right += (logits.argmax(1) == labels).sum()
            return loss

        def on_train_epoch_end(self) -> None:
            found.append(1000 * (time.perf_counter() - self.began) / STEPS)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)

    ready = [(torch.randn(BATCH, 3, 32, 32), torch.arange(BATCH))] * STEPS
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    # A list would be several loaders to Lightning.
    trainer.fit(Module(), torch.utils.data.DataLoader(ready, batch_size=None))  # type: ignore[arg-type]
    return found


def project() -> list[float]:
    """``cifar_dist.train`` without Ray."""
    from cifar_dist.config.train import TrainConfig
    from cifar_dist.registry import NETWORKS
    from cifar_dist.train import train

    NETWORKS.register("resnet18", Nothing)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            dataset="digits", num_workers=0, batch_size=BATCH, max_epochs=EPOCHS, report=False,
            storage_path=folder, name="run", checkpoint_every=EPOCHS,
        )  # fmt: skip
        rows = train(config).outcome.history
    return [1000 * BATCH / row["images_per_second"] for row in rows]


def main() -> None:
    """Run one and print its milliseconds a step as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=("loop", "lightning", "project"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    run = {"loop": loop, "lightning": lightning, "project": project}[chosen.which]
    print(json.dumps(run()))


if __name__ == "__main__":
    main()
