"""What determinism costs: images a second with ``--deterministic`` on and off.

``python -m benchmarks.determinism`` trains in this process without Ray, in turn (A B A B ...), on
real CIFAR-10 images where ``CIFAR_DIST_DATA`` names them, else on digits, and takes the images a
second of each run's second epoch. On a GPU with ``--use-gpu``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from cifar_dist.config import TrainConfig
from cifar_dist.train import train


def images_per_second(settings: dict[str, Any], deterministic: bool) -> float:
    """Of the second epoch."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            **settings, num_workers=0, max_epochs=2, deterministic=deterministic,
            storage_path=folder, checkpoint_every=2,
        )  # fmt: skip
        return float(train(config).outcome.history[1]["images_per_second"])


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--use-gpu", action="store_true")
    parser.add_argument(
        "--dataset", default="cifar10" if "CIFAR_DIST_DATA" in os.environ else "digits"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/determinism.json"))
    chosen = parser.parse_args()
    settings = {"dataset": chosen.dataset, "use_gpu": chosen.use_gpu}
    images_per_second(settings, True)  # warm-up
    figures: dict[str, list[float]] = {"on": [], "off": []}
    for _ in range(chosen.repeats):
        for switch, values in figures.items():
            values.append(images_per_second(settings, switch == "on"))
            print(switch, f"{values[-1]:.0f} images/s", flush=True)
    on, off = (statistics.median(figures[switch]) for switch in ("on", "off"))
    for switch, values in figures.items():
        print(f"| {switch} | {statistics.median(values):.0f} ({min(values):.0f} to "
              f"{max(values):.0f}) |")  # fmt: skip
    print(f"on over off: {on / off:.3f}")
    result = {"machine": machine(), "settings": settings, "images_per_second": figures}
    chosen.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
