"""What determinism costs: images a second with ``--deterministic`` on and off.

``python -m benchmarks.determinism`` trains in this process without Ray, in turn (A B A B ...), on
real CIFAR-10 images where ``CIFAR_DIST_DATA`` names them, else on digits, and takes the images a
second of each run's second epoch. On a GPU with ``--use-gpu``.
"""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
from typing import Any

from benchmarks.side_by_side import arguments, in_turn, ratios, say, write
from cifar_dist.config.train import TrainConfig
from cifar_dist.train import train


def images_per_second(settings: dict[str, Any], deterministic: bool) -> dict[str, float]:
    """Of the second epoch."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            **settings, num_workers=0, max_epochs=2, deterministic=deterministic,
            storage_path=folder, checkpoint_every=2, report=False,
        )  # fmt: skip
        rate = train(config).outcome.history[1]["images_per_second"]
        return {"images_per_second": float(rate)}


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = arguments(__doc__, "determinism")
    parser.add_argument("--use-gpu", action="store_true")
    parser.add_argument(
        "--dataset", default="cifar10" if "CIFAR_DIST_DATA" in os.environ else "digits"
    )
    chosen = parser.parse_args()
    settings = {"dataset": chosen.dataset, "use_gpu": chosen.use_gpu}
    of = functools.partial(images_per_second, settings)
    figures = in_turn(
        {"on": lambda: of(True), "off": lambda: of(False)}, chosen.repeats, chosen.warm_ups
    )
    say(figures, "images_per_second", "off", "--deterministic, images a second")
    on = ratios(figures, "images_per_second", "off")["on"]
    print(f"on over off: {statistics.median(on):.3f}")
    write(chosen.output, figures, settings=settings)


if __name__ == "__main__":
    main()
