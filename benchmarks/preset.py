"""What the preset ``cifar`` brings: its accuracy beside the one's before it, at equal epochs.

``python -m benchmarks.preset`` trains in this process without Ray, in turn (A B A B ...), each pair
with another seed, on the first images of CIFAR-10, which ``CIFAR_DIST_DATA`` names. It is a short
run on a small CPU subset and shows no more: images are halved to 16x16 pixels, float32 takes the
place of bf16, and a small batch that of 512, which would leave a handful of steps; both highest
learning rates are scaled down with it (Goyal et al. 2017). Accuracy and seconds of the preset as it
stands want a GPU.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.images import write_folder
from benchmarks.side_by_side import arguments, in_turn, write
from cifar_dist.config.presets import PRESETS
from cifar_dist.config.train import make_config
from cifar_dist.train import train

BEFORE: dict[str, Any] = {
    "stem": "cifar",
    "optimizer": "sgd",
    "schedule": "onecycle",
    "lr": 0.2,
    "weight_decay": 5e-4,
    "batch_size": 512,
    "cutout": 8,
    "label_smoothing": 0.1,
    "precision": "bf16-mixed",
    "channels_last": True,
}
"""The preset ``cifar`` as it was before it had its length, reflect padding and an average."""


def accuracy(preset: dict[str, Any], common: dict[str, Any], seed: int) -> dict[str, float]:
    """Accuracies of one run, of its best epoch's weights, and of its last epoch on held-out images.

    Args:
        preset: settings for 512 images a batch.
        common: settings of both presets, over their own; with ``batch_size``.
        seed: of initialisation, order and augmentation.
    """
    with tempfile.TemporaryDirectory() as folder:
        lr = preset["lr"] * common["batch_size"] / preset["batch_size"]
        run = {"lr": lr, "seed": seed, "storage_path": folder}
        done = train(make_config({**preset, **common, **run}))
    last = done.outcome.history[-1]
    return {
        "val_accuracy": done.summary["val_accuracy"],
        "val_accuracy_last": last["val_accuracy"],
        "train_accuracy_last": last["train_accuracy"],
        "test_accuracy": done.summary["test_accuracy"],
    }


def of_next_seed(preset: dict[str, Any], common: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """Return a function that trains with seed 0 when first called, then with 1, and so on."""
    seeds = count()
    return lambda: accuracy(preset, common, next(seeds))


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = arguments(__doc__, "preset", repeats=3)
    parser.set_defaults(warm_ups=0)
    parser.add_argument(
        "--train-images", type=int, default=1000, help="a tenth is held out of them"
    )
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--image-size", type=int, default=16, help="pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-epochs", type=int, default=PRESETS["cifar"]["max_epochs"])
    chosen = parser.parse_args()
    if "CIFAR_DIST_DATA" not in os.environ:
        sys.exit("error: CIFAR_DIST_DATA is not set: it must name a folder with CIFAR-10")
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), chosen.train_images, chosen.test_images)
        common = {
            "data_dir": folder,
            "num_workers": 0,
            "max_epochs": chosen.max_epochs,
            "batch_size": chosen.batch_size,
            "image_size": chosen.image_size,
            "precision": "32",
            "channels_last": False,
            "checkpoint_every": chosen.max_epochs,
            "report": False,
        }
        presets = {"before": BEFORE, "now": PRESETS["cifar"]}
        figures = in_turn(
            {name: of_next_seed(preset, common) for name, preset in presets.items()},
            chosen.repeats,
            chosen.warm_ups,
        )
    print(
        "\n| preset | validation accuracy | test accuracy, mean | of each seed |\n|---|---|---|---|"
    )
    for name, runs in figures.items():
        val = statistics.mean(run["val_accuracy"] for run in runs)
        tests = [run["test_accuracy"] for run in runs]
        each = ", ".join(f"{value:.3f}" for value in tests)
        print(f"| {name} | {val:.3f} | {statistics.mean(tests):.3f} | {each} |")
    settings = {key: value for key, value in common.items() if key != "data_dir"}
    images = {"train_images": chosen.train_images, "test_images": chosen.test_images}
    write(chosen.output, figures, settings={**images, **settings}, presets=presets)


if __name__ == "__main__":
    main()
