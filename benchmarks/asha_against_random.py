"""What ASHA saves: it and plain random search over the same drawn configurations.

``python -m benchmarks.asha_against_random --data-dir DIR`` takes the first images of a CIFAR-10 in
Parquet files, and for each seed runs both searches in turn (A B B A ...). Random search runs every
configuration to its last epoch; what it finds is the best there is. For both: epochs run and
seconds from the first trial's start, in all and until some trial first came within half a point
of that best.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from cifar_dist.config.tune import make_tune_config
from cifar_dist.events import Event, TrialUpdated
from cifar_dist.tune import search
from tests.conftest import first_images

SETTINGS: dict[str, Any] = {
    "space": "adamw_steplr",
    "num_samples": 16,
    "max_epochs": 9,
    "precision": "bf16-mixed",
    "channels_last": True,
}
TRAIN_IMAGES, TEST_IMAGES = 2_000, 100
WITHIN = 0.005


class Clock:
    """Notes, at each trial's epoch, the seconds, the epochs so far and the best value so far."""

    def __init__(self) -> None:
        self.points: list[tuple[float, int, float]] = []
        self._began: float | None = None
        self._epochs: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        """Listen to a search."""
        if not isinstance(event, TrialUpdated):
            return
        now = time.monotonic()
        self._began = self._began or now
        before = self._epochs.get(event.trial_id, 0)
        if event.value is not None and event.epochs > before:
            self._epochs[event.trial_id] = event.epochs
            best = max(event.value, self.points[-1][2] if self.points else 0.0)
            self.points.append((now - self._began, sum(self._epochs.values()), best))


def measure(folder: Path, seed: int, scheduler: str) -> dict[str, Any]:
    """Run one search."""
    clock = Clock()
    settings = {
        **SETTINGS,
        "data_dir": str(folder),
        "report": False,
        "storage_path": str(folder),
        "name": f"{scheduler}-{seed}",
        "seed": seed,
        "scheduler": scheduler,
    }
    searched = search(make_tune_config(settings), clock)
    seconds = clock.points[-1][0]
    return {
        "best": searched.summary["val_accuracy"],
        "epochs": searched.summary["epochs_run"],
        "seconds": seconds,
        "drawn": searched.table[["lr", "weight_decay", "step_size", "gamma"]].to_dict("records"),
        "points": clock.points,
    }


def main() -> None:
    """Measure, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("asha_against_random.json"))
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first_images(options.data_dir, folder, TRAIN_IMAGES, TEST_IMAGES)
        for seed in range(options.seeds):
            order = ("none", "asha") if seed % 2 == 0 else ("asha", "none")
            runs = {scheduler: measure(folder, seed, scheduler) for scheduler in order}
            assert runs["asha"]["drawn"] == runs["none"]["drawn"]
            found.append({"seed": seed, **runs})
            print(_row(found[-1]), flush=True)
    about = {"settings": SETTINGS, "images": TRAIN_IMAGES, "within": WITHIN}
    options.out.write_text(json.dumps({**machine(), **about, "seeds": found}, indent=2) + "\n")
    print(
        "\n| seed | best of random | ASHA's best | epochs, random | epochs, ASHA | share |", end=""
    )
    print(" epochs to it, random | ASHA | seconds to it, random | ASHA | seconds in all |")
    print("|" + "---|" * 11)
    for each in found:
        print(_row(each))
    shares = [each["asha"]["epochs"] / each["none"]["epochs"] for each in found]
    gaps = [each["none"]["best"] - each["asha"]["best"] for each in found]
    print(
        f"\nmedian share of epochs {statistics.median(shares):.2f} ({min(shares):.2f} to "
        f"{max(shares):.2f}); points behind {100 * statistics.median(gaps):.2f} "
        f"({100 * min(gaps):.2f} to {100 * max(gaps):.2f})"
    )


def _row(each: dict[str, Any]) -> str:
    random, asha = each["none"], each["asha"]
    reached = [
        next((point for point in run["points"] if point[2] >= random["best"] - WITHIN), None)
        for run in (random, asha)
    ]
    to_epochs = [str(first[1]) if first else "not reached" for first in reached]
    to_seconds = [f"{first[0]:.0f}" if first else "not reached" for first in reached]
    cells = [
        each["seed"],
        f"{random['best']:.4f}",
        f"{asha['best']:.4f}",
        random["epochs"],
        asha["epochs"],
        f"{asha['epochs'] / random['epochs']:.2f}",
        *to_epochs,
        *to_seconds,
        f"{random['seconds']:.0f} / {asha['seconds']:.0f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
