"""What trials do in tests instead of training; Ray imports this module in their processes."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

from cifar_dist.cluster.trials import TrialWork, train_here
from cifar_dist.runs.metrics import METRICS, Outcome
from tests.cluster.trials import number_of


def report_epochs(work: TrialWork, losses: list[float], dies_at: int = 0) -> None:
    """Report an epoch for each loss, after those on disk.

    Args:
        work: the trial's.
        losses: by epoch.
        dies_at: the epoch after which the process dies, with its row on disk and not reported.
    """
    rows = work.run.read_metrics()
    for epoch in range(len(rows) + 1, len(losses) + 1):
        loss = losses[epoch - 1]
        row = {
            **dict.fromkeys(METRICS, 0.5), "epoch": epoch, "step": epoch, "samples": epoch,
            "world_size": 1, "val_loss": loss, "val_accuracy": epoch / 10,
        }  # fmt: skip
        rows.append(row)
        work.run.write_metrics(rows)
        if epoch == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        work.report(row)


def dying_before_a_report(work: TrialWork) -> None:
    """Trial 0 dies before its second report, trial 1 before its last one, each once."""
    once = work.run.path / "died"
    at = 0 if once.exists() else {0: 2, 1: work.config.max_epochs}.get(number_of(work), 0)
    once.touch()
    losses = [1 - epoch / 10 - number_of(work) / 100 for epoch in range(work.config.max_epochs)]
    report_epochs(work, losses, dies_at=at)


def diverging(work: TrialWork) -> None:
    """The first trial has no loss, the second one has a good one and loses it."""
    nan = math.nan
    by_number = {0: [nan, nan], 1: [0.3, nan], 2: [0.2, 0.1]}
    report_epochs(work, by_number.get(number_of(work), [0.5, 0.4]))


def on_a_full_disk(work: TrialWork) -> None:
    """Trial 1 finds no room for its checkpoint, unless somebody has made some."""
    report_epochs(work, [0.5])
    storage = work.run.path.parents[2]
    if number_of(work) == 1 and not (storage / "room").exists():
        Path("/dev/full").write_text("a checkpoint")
    report_epochs(work, [0.5, 0.4])


def in_a_lost_folder(work: TrialWork) -> None:
    """Trial 1's folder is taken away, unless that has happened before."""
    taken = work.run.path.with_name("taken")
    if number_of(work) == 1 and not taken.exists():
        work.run.path.rename(taken)
    report_epochs(work, [0.5, 0.4])


def hanging_once(work: TrialWork) -> Outcome:
    """Train, but the first time hang in the second step."""
    from cifar_dist.training import checkpointing, fit

    marker = work.run.path / "hung"

    class Hanging(checkpointing.RunCheckpointer):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step == 2 and not marker.exists():
                marker.touch()
                time.sleep(10_000)

    fit.RunCheckpointer = Hanging
    return train_here(work)


def failing_once(work: TrialWork) -> None:
    """Trial 0 fails, unless the mistake was corrected."""
    storage = work.run.path.parents[2]
    report_epochs(work, [0.5])
    if number_of(work) == 0 and not (storage / "corrected").exists():
        raise ZeroDivisionError("no trial divides by zero")
    report_epochs(work, [0.5, 0.4])
