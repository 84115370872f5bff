"""From the command to the first optimizer step: the project against Ray's documented example.

``python -m benchmarks.startup`` starts, in turn, as processes of their own: the project with two
Ray workers; Ray's documented Lightning example with two workers, on the same images; the project
without Ray; and a bare script that imports the same libraries and makes one step. What counts is
the seconds from the start of the command's process to the end of the first optimizer step on
rank 0; marks on the way tell where they go. Files are in the machine's memory: a first round is
thrown away. Ray itself is started by each command, as on one machine it is.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import arguments, in_turn, say, write

FOLDER = "CIFAR_DIST_BENCHMARK_MARKS"
"""Environment variable: where processes leave their marks."""
BATCH = 128


def mark(name: str) -> None:
    """Leave the time of day under a name, unless a mark of that name is there."""
    file = Path(os.environ[FOLDER]) / name
    if not file.exists():
        file.write_text(repr(time.time()))


def mark_first_step() -> None:
    """Have every optimizer of this process leave a mark behind its step."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: mark("first step"))


def timed_worker(work: Any) -> Any:
    """The project's worker, with marks."""
    import ray.train

    from cifar_dist.cluster.trainer import train_worker

    if ray.train.get_context().get_world_rank() == 0:
        mark("in the worker")
        mark_first_step()
    return train_worker(work)


def project(folder: str, workers: int) -> None:
    """``python -m cifar_dist.train`` with marks."""
    from cifar_dist.train import main

    if workers:
        # Behind the command's own start, which is to load them in its own order.
        import cifar_dist.cluster.resources as resources

        original = resources.have_resources

        def check(*asked: Any) -> None:
            mark("Ray is up")
            original(*asked)
            from cifar_dist.cluster import trainer

            trainer.train_on_ray = functools.partial(trainer.train_on_ray, worker=timed_worker)

        resources.have_resources = check
    else:
        mark_first_step()
    main(
        [
            "--data-dir", folder, "--num-workers", str(workers), "--max-epochs", "1",
            "--storage-path", os.environ[FOLDER], "--name", "run", "--no-report",
        ]
    )  # fmt: skip


def example(folder: str, workers: int) -> None:
    """Ray's documented Lightning example, on these images.

    Source: Ray's "Get Started with Distributed Training using PyTorch Lightning".
    """
    import lightning.pytorch as pl
    import numpy as np
    import ray.train.lightning
    import torch
    from ray.train.torch import TorchTrainer
    from torch.utils.data import DataLoader
    from torchvision.models import resnet18

    from benchmarks.loader import InMemory, transforms

    class ImageClassifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = resnet18(num_classes=10)
            self.criterion = torch.nn.CrossEntropyLoss()

        def forward(self, x: Any) -> Any:
            return self.model(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            loss = self.criterion(self.forward(x), y)
            self.log("loss", loss, on_step=True, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.model.parameters(), lr=0.001)

    def train_func() -> None:
        if ray.train.get_context().get_world_rank() == 0:
            mark("in the worker")
            mark_first_step()
        stored = np.load(Path(folder) / "train.npz")
        transform = transforms("v1", (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
        loader = DataLoader(
            InMemory(stored["images"], stored["labels"], transform), BATCH // workers, shuffle=True
        )
        trainer = pl.Trainer(
            max_epochs=1, devices="auto", accelerator="auto",
            strategy=ray.train.lightning.RayDDPStrategy(),
            plugins=[ray.train.lightning.RayLightningEnvironment()],
            callbacks=[ray.train.lightning.RayTrainReportCallback()],
            enable_checkpointing=False,
        )  # fmt: skip
        trainer = ray.train.lightning.prepare_trainer(trainer)
        trainer.fit(ImageClassifier(), train_dataloaders=loader)

    TorchTrainer(
        train_func,
        scaling_config=ray.train.ScalingConfig(num_workers=workers),
        run_config=ray.train.RunConfig(storage_path=os.environ[FOLDER]),
    ).fit()


def bare(folder: str, _: int) -> None:
    """Imports what the project imports for a run without Ray, and makes one step."""
    import lightning.pytorch
    import numpy as np
    import torch
    import torchmetrics.classification
    import torchvision.models

    from benchmarks.loader import InMemory, transforms

    assert lightning.pytorch
    assert torchmetrics.classification
    mark_first_step()
    stored = np.load(Path(folder) / "train.npz")
    transform = transforms("v1", (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    dataset = InMemory(stored["images"], stored["labels"], transform)
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True)
    model = torchvision.models.resnet18(num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = next(iter(loader))
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


COMMANDS = {"project": project, "example": example, "bare": bare}


def started(which: str, folder: Path, workers: int) -> dict[str, float]:
    """Seconds from a command's start to each mark."""
    with tempfile.TemporaryDirectory() as marks:
        env = {**os.environ, FOLDER: marks, "RAY_ADDRESS": "local"}
        words = [sys.executable, "-m", "benchmarks.startup", "--run", which, str(folder)]
        began = time.time()
        done = subprocess.run(
            [*words, str(workers)], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        seconds = {}
        for name in ("Ray is up", "in the worker", "first step"):
            if (file := Path(marks) / name).exists():
                seconds[name] = float(file.read_text()) - began
        return seconds


def prepared(folder: Path) -> None:
    """The same images for all: Parquet for the project, which decodes them once, arrays for the
    peers."""
    import numpy as np

    from benchmarks import images
    from cifar_dist.data.cache import prepare
    from cifar_dist.data.datasets import find_source

    images.write_folder(folder, 1_280, 100)
    prepare("cifar10", find_source("cifar10", str(folder)))
    pixels, labels = images.arrays(folder)
    np.savez(folder / "train.npz", images=pixels, labels=labels)


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = arguments(__doc__, "startup")
    parser.add_argument("--run", nargs=3, help="for the subjects' own processes")
    chosen = parser.parse_args()
    if chosen.run:
        which, folder, workers = chosen.run
        COMMANDS[which](folder, int(workers))
        return
    with tempfile.TemporaryDirectory() as name:
        prepared(Path(name))
        subjects: dict[str, Any] = {
            "cifar_dist, 2 workers": functools.partial(started, "project", Path(name), 2),
            "Ray's example, 2 workers": functools.partial(started, "example", Path(name), 2),
            "cifar_dist, no Ray": functools.partial(started, "project", Path(name), 0),
            "bare script": functools.partial(started, "bare", Path(name), 0),
        }
        figures = in_turn(subjects, chosen.repeats, chosen.warm_ups)
    for pair, over in ((list(subjects)[:2], "Ray's example, 2 workers"),
                       (list(subjects)[2:], "bare script")):  # fmt: skip
        say({each: figures[each] for each in pair}, "first step", over, "first step, s", ".1f")
    print(json.dumps({name: runs[0] for name, runs in figures.items()}, indent=1))
    write(chosen.output, figures)


if __name__ == "__main__":
    main()
