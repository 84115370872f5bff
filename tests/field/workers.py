"""What workers do in tests besides training; Ray imports this module in them."""

from __future__ import annotations

import os
import signal
from typing import Any

from cifar_dist.cluster.trainer import Work, train_worker
from cifar_dist.runs.metrics import Outcome


def stopped_worker(work: Work) -> Outcome:
    """Train, but the first time rank 1's process is stopped before its sixth step, of epoch 2."""
    from cifar_dist.training import checkpointing, fit

    marker = work.run.path / "stopped"

    class Stopped(checkpointing.RunCheckpointer):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            if trainer.global_rank == 1 and trainer.global_step == 5 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGSTOP)

    fit.RunCheckpointer = Stopped
    return train_worker(work)
