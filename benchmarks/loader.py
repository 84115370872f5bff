"""Augmented, normalised float32 batches a second: the project's loader against torchvision's.

``python -m benchmarks.loader`` makes batches of 128 images (crop with padding 4, flip, normalise)
with one thread and with two, in turn with torchvision's transforms (v1 on PIL images as its CIFAR10
gives them, and v2 on tensors) in torch's DataLoader without and with two processes, and with the
limit: a copy of as many finished float32 batches from memory to memory.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks import images as measured
from benchmarks.side_by_side import arguments, in_turn, say, write
from cifar_dist.config.train import TrainConfig
from cifar_dist.data.cache import prepare
from cifar_dist.data.datamodule import ImageDataModule
from cifar_dist.data.datasets import find_source

IMAGES = 10_000
BATCH = 128
PROJECT_EPOCHS = 5
"""The project goes through the images so often, to take about as long as the peers."""
LIMIT_EPOCHS = 50


class InMemory(Dataset[Any]):
    """Images in memory, one at a time, as torchvision's ``CIFAR10`` is."""

    def __init__(self, images: Any, labels: Any, transform: Callable[[Any], Any]) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def transforms(version: str, mean: Any, std: Any) -> Callable[[Any], Any]:
    """What torchvision's documentation shows for CIFAR-10, in either version."""
    if version == "v1":
        from torchvision import transforms as v1

        return v1.Compose(
            [
                v1.RandomCrop(32, 4),
                v1.RandomHorizontalFlip(),
                v1.ToTensor(),
                v1.Normalize(mean, std),
            ]
        )
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.ToImage(),
            v2.RandomCrop(32, 4),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )


def rate(batches: Callable[[], Iterable[Any]], threads: int, epochs: int = 1) -> dict[str, float]:
    """Images a second of some epochs."""
    torch.set_num_threads(threads)
    began, seen = time.perf_counter(), 0
    for _ in range(epochs):
        for batch in batches():
            seen += len(batch[0])
    return {"images_per_second": seen / (time.perf_counter() - began)}


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = arguments(__doc__, "loader")
    parser.add_argument("--images", type=int, default=IMAGES)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured.write_folder(folder, chosen.images, 10)
        dataset = prepare("cifar10", find_source("cifar10", str(folder)))
        pixels, labels = measured.arrays(folder)
        module = ImageDataModule(TrainConfig(data_dir=name, batch_size=BATCH), dataset)
    finished = torch.randn(chosen.images, 3, 32, 32)
    copied = torch.empty(BATCH, 3, 32, 32)

    def project() -> Iterable[Any]:
        return map(module.ready, module.train_dataloader())

    def copies() -> Iterable[Any]:
        for start in range(0, len(finished) - BATCH + 1, BATCH):
            yield (copied.copy_(finished[start : start + BATCH]),)

    subjects: dict[str, Callable[[], dict[str, float]]] = {}
    for threads in (1, 2):
        count = "one thread" if threads == 1 else "two threads"
        subjects[f"cifar_dist, {count}"] = functools.partial(rate, project, threads, PROJECT_EPOCHS)
    for version in ("v1", "v2"):
        transform = transforms(version, dataset.mean, dataset.std)
        for workers in (0, 2):
            loader = DataLoader(
                InMemory(pixels, labels, transform), BATCH, shuffle=True, num_workers=workers,
                persistent_workers=workers > 0,
            )  # fmt: skip
            subjects[f"torchvision {version}, {workers} workers"] = functools.partial(
                rate, functools.partial(iter, loader), 1
            )
    subjects["a copy of the finished batches"] = functools.partial(rate, copies, 1, LIMIT_EPOCHS)
    figures = in_turn(subjects, chosen.repeats, chosen.warm_ups)
    say(figures, "images_per_second", "torchvision v1, 0 workers", "images a second")
    about = {"images": chosen.images, "batch_size": BATCH, "source": measured.source()}
    write(chosen.output, figures, **about)


if __name__ == "__main__":
    main()
