"""What trials do in tests instead of training; Ray imports this module in their processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from cifar_dist.cluster.trials import TrialWork
from cifar_dist.errors import Diverged
from cifar_dist.runs.metrics import METRICS

EPOCH_S = 0.15


def number_of(work: TrialWork) -> int:
    """The trial's number."""
    return int(work.run.name.removeprefix("t"))


def accuracy(lr: float, epoch: int) -> float:
    """What a trial reaches: a pure function, better towards lr 0.001, with epochs, and uneven."""
    import numpy as np

    noise = int(np.random.Philox(key=[int(lr * 1e9), epoch]).random_raw()) / 2**64
    return round(max(0.0, 1 - abs(lr - 0.001) * 60) * epoch / (epoch + 2) + noise * 0.05, 6)


def curve(work: TrialWork) -> None:
    """Go on from the rows on disk to the last epoch, a row every `EPOCH_S` seconds."""
    rows = work.run.read_metrics()
    for epoch in range(len(rows) + 1, work.config.max_epochs + 1):
        time.sleep(EPOCH_S)
        value = accuracy(work.config.lr, epoch)
        row = {
            **dict.fromkeys(METRICS, 0.0),
            "epoch": epoch,
            "step": epoch,
            "samples": epoch,
            "world_size": 1,
            "val_accuracy": value,
            "val_loss": 1 - value,
            "seconds": EPOCH_S,
        }
        rows.append(row)
        work.run.write_metrics(rows)
        work.report(row)


def uneven_curve(work: TrialWork) -> None:
    """As `curve`, but every third trial is slow to begin."""
    time.sleep(0.7 * (number_of(work) % 3 == 0))
    curve(work)


def with_pid(work: TrialWork) -> None:
    """As `curve`, and leave the process's id."""
    (work.run.path / "pid").write_text(str(os.getpid()))
    curve(work)


def faulty(work: TrialWork) -> None:
    """Trial 1 raises, 2 diverges, 3 is killed each time, 4 is killed once; others are fine."""
    number = number_of(work)
    killed_before = work.run.path / "killed"
    if number == 1:
        raise ZeroDivisionError("no trial divides by zero\nand more")
    if number == 2:
        raise Diverged("the loss of epoch 1 is nan (lr 10); lower --lr")
    if number == 3 or (number == 4 and not killed_before.exists()):
        killed_before.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    curve(work)


_device_broken = False


def on_a_device(work: TrialWork) -> None:
    """Trial 2 breaks this process's device, after which each trial fails in it; trial 3 raises."""
    global _device_broken
    with (work.run.path / "pids").open("a") as file:
        file.write(f"{os.getpid()}\n")
    _device_broken = _device_broken or number_of(work) == 2
    if _device_broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")
    if number_of(work) == 3:
        raise ZeroDivisionError("no trial divides by zero")
    curve(work)


def endless(work: TrialWork) -> None:
    """A row an epoch, and no end."""
    curve(work)
    Path(work.run.path / "waiting").touch()
    time.sleep(10_000)
