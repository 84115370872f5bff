"""Seconds that an epoch loses to its checkpoint: written beside training, and in the loop.

``python -m benchmarks.checkpoint`` trains ResNet-18 on digits without Ray, in turn as it comes,
where a thread writes the checkpoint of 134 MB while the next epoch trains, and with training
waiting for the thread each time, which is what writing in the loop would take. Of each epoch but
the first and the last it gives the seconds from the end of validation until training continues, and
those of the whole epoch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, cast

import torch

from benchmarks.side_by_side import arguments, in_turn, output, say, write

EPOCHS = 8


def measure(waits: bool, threads: int) -> dict[str, float]:
    """Train in this process, with training waiting for each file or not."""
    from cifar_dist.config.train import TrainConfig
    from cifar_dist.train import train
    from cifar_dist.training.checkpointing import RunCheckpointer
    from cifar_dist.training.history import MetricsHistory
    from cifar_dist.training.writer import BackgroundWriter

    torch.set_num_threads(threads)
    held: list[float] = []
    starts: list[float] = []
    validated: list[float] = []
    submit, saved = BackgroundWriter.submit, RunCheckpointer.on_train_epoch_end
    ended, started = MetricsHistory.on_train_epoch_end, MetricsHistory.on_train_epoch_start

    def submit_and_wait(self: BackgroundWriter, job: Callable[[], None]) -> None:
        submit(self, job)
        self.wait()

    def note_validated(self: MetricsHistory, *args: Any) -> None:
        validated.append(time.perf_counter())
        ended(self, *args)

    def note_saved(self: RunCheckpointer, *args: Any) -> None:
        saved(self, *args)
        held.append(time.perf_counter() - validated[-1])

    def note_start(self: MetricsHistory, *args: Any) -> None:
        starts.append(time.perf_counter())
        started(self, *args)

    history, checkpointer = cast(Any, MetricsHistory), cast(Any, RunCheckpointer)
    history.on_train_epoch_end, history.on_train_epoch_start = note_validated, note_start
    checkpointer.on_train_epoch_end = note_saved
    if waits:
        BackgroundWriter.submit = submit_and_wait  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        train(
            TrainConfig(
                dataset="digits",
                num_workers=0,
                max_epochs=EPOCHS,
                report=False,
                storage_path=folder,
                name="run",
            )
        )
    epochs = [after - before for before, after in itertools.pairwise(starts)]
    return {"held": statistics.median(held[1:-1]), "epoch": statistics.median(epochs[1:])}


def in_a_process(waits: bool, threads: int) -> Callable[[], dict[str, float]]:
    """Return a function that measures once, in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.checkpoint", "--once", str(int(waits)), str(threads)]
    return lambda: json.loads(output(words).splitlines()[-1])


def main() -> None:
    """Measure, print tables, and write JSON."""
    parser = arguments(__doc__, "checkpoint")
    parser.add_argument("--once", type=int, nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.once:
        print(json.dumps(measure(bool(chosen.once[0]), chosen.once[1])))
        return
    subjects = {
        f"{name}, {threads} thread{'s' * (threads > 1)}": in_a_process(waits, threads)
        for threads in (1, 2)
        for name, waits in (("in the loop", True), ("beside training", False))
    }
    figures = in_turn(subjects, chosen.repeats, chosen.warm_ups)
    over = next(iter(subjects))
    say(figures, "held", over, "seconds that training is held up, an epoch", ".3f")
    say(figures, "epoch", over, "seconds of an epoch", ".3f")
    write(chosen.output, figures)


if __name__ == "__main__":
    main()
