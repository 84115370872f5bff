"""Seconds lost to the kill of one worker: noticing it, starting anew, catching up.

``python -m benchmarks.worker_lost`` kills a worker (SIGKILL) of a run of two, on a Ray cluster of
this machine, at a step drawn from a seed, and takes the times from the driver's events. With Ray
as it comes (its public API, its own intervals, and all its processes) and with the project's
settings, in turn (A B A B ...), at the same steps, with the same workers; also without any fault,
for what fewer processes do to the first start.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.side_by_side import arguments, in_turn, say, write
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
    from cifar_dist.cluster import trainer
    from cifar_dist.cluster.ray_internals import PLAIN_RAY
    from tests.faults import driver

    if way == WAYS[0]:
        os.environ[PLAIN_RAY] = "1"
        trainer.ray_settings = lambda config: {}
    driver.main([config])


def one(folder: Path, way: str, repeats: Iterator[int]) -> dict[str, float]:
    """The seconds of one kill."""
    repeat = next(repeats)
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
    parser = arguments(__doc__, "worker_lost")
    parser.add_argument("--driver", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.driver:
        drive(*chosen.driver)
        return
    with tempfile.TemporaryDirectory() as folder:
        of = functools.partial(one, Path(folder))
        # Both ways count for themselves: the same steps for both.
        subjects = {way: functools.partial(of, way, itertools.count()) for way in WAYS}
        figures = in_turn(subjects, chosen.repeats, chosen.warm_ups)
    for part in figures[WAYS[0]][0]:
        say(figures, part, WAYS[0], f"{part}, seconds", ".1f")
    write(chosen.output, figures)


if __name__ == "__main__":
    main()
