"""Seconds lost to the kill of one worker: noticing it, starting anew, catching up.

``python -m benchmarks.worker_lost`` kills a worker (SIGKILL) of a run of two, on a Ray cluster of
this machine, at a step drawn from a seed, and takes the times from what the driver is told. With
Ray Train as it comes (its own intervals, and all its processes) and with the project's settings,
in turn (A B A B ...), at the same steps, with the same workers; also without any fault, for what
fewer processes do to the first start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import machine
from tests.faults.campaign import STEPS, draw, run

EPOCHS = 3
WAYS = ("as it comes", "as set here")


class ThisMachine:
    """A cluster that the driver starts itself."""

    address = "local"
    kind = "this machine"

    def __init__(self, way: str) -> None:
        self.way = way

    def names(self) -> list[str]:
        """No hosts besides."""
        return []

    def command(self, words: list[str]) -> list[str]:
        """The driver's command, which becomes this module."""
        return [sys.executable, "-m", "benchmarks.worker_lost", "--driver", self.way, words[-1]]


def drive(way: str, config: str) -> None:
    """Be the driver of a run."""
    import ray.train.torch

    from cifar_dist.cluster import trainer
    from tests.faults import driver

    if way == WAYS[0]:
        trainer.CleanedUpAfter = ray.train.torch.TorchTrainer  # type: ignore[misc]
        trainer.ProcessGroup = ray.train.torch.TorchConfig  # type: ignore[misc]
        trainer.ray_settings = lambda config: {}
    driver.main([config])


def one(folder: Path, way: str, repeat: int) -> dict[str, float]:
    """The seconds of one kill."""
    faults = draw(repeat, ["worker"], EPOCHS * STEPS - 6)  # not behind the last step
    ended = run(ThisMachine(way), folder, f"{way}{repeat}".replace(" ", "-"), EPOCHS, faults)
    fault = ended.faults[0]
    assert ended.every_image_once
    assert fault.detected is not None
    assert fault.restarted is not None
    assert fault.caught_up is not None
    return {
        "first start": ended.first_start,
        "detection": fault.detected,
        "restart": fault.restarted - fault.detected,
        "catching up": fault.caught_up - fault.restarted,
        "lost": fault.caught_up,
    }


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/worker_lost.json"))
    parser.add_argument("--driver", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.driver:
        drive(*chosen.driver)
        return
    figures: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        one(Path(folder), WAYS[1], 1000)  # files into the machine's memory, the data into the cache
        for repeat in range(chosen.repeats):
            for way in WAYS:
                figures[way].append(one(Path(folder), way, repeat))
                print(way, {k: round(v, 1) for k, v in figures[way][-1].items()}, flush=True)
    print("| seconds, median (least to most) | " + " | ".join(WAYS) + " | ratio |")
    print("|---|---|---|---|")
    for part in figures[WAYS[0]][0]:
        cells, medians = [], []
        for way in WAYS:
            values = [each[part] for each in figures[way]]
            medians.append(statistics.median(values))
            cells.append(f"{medians[-1]:.1f} ({min(values):.1f} to {max(values):.1f})")
        print(f"| {part} | {cells[0]} | {cells[1]} | {medians[1] / medians[0]:.2f} |")
    result = {"machine": machine(), "repeats": chosen.repeats, "seconds": figures}
    chosen.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
