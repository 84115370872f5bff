"""The rows of a run's metrics: made, kept, written and reported."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint

from cifar_dist.config.train import TrainConfig
from cifar_dist.model.classifier import Classifier
from cifar_dist.registry import COLUMNS
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.training.columns import EpochEnd

Report = Callable[[dict[str, Any]], None]
"""Called with an epoch's row of ``metrics.csv``."""


class MetricsHistory(Checkpoint):
    """Callback that keeps a row an epoch, and knows the best epoch.

    Every rank keeps all rows; rank 0 writes them. They are part of checkpoints, so that a resumed
    run continues with the rows of its checkpoint: none is lost or doubled.

    Being a `Checkpoint` makes Lightning call it after all other callbacks. It must come before
    `RunCheckpointer`, which saves what it has kept.

    Args:
        run: where ``metrics.csv`` is.
        config: the run's settings, for trackers.
        report: called on every rank with each epoch's row.
    """

    def __init__(self, run: RunDirectory, config: TrainConfig, report: Report) -> None:
        self.run = run
        self.config = config
        self.report = report
        self.rows: list[dict[str, Any]] = []
        self.best_epoch = 0
        """That of the highest validation accuracy, the earliest of equals; 1-based."""
        self._lr = 0.0
        self._epoch_started = self._trained = 0.0
        self._seconds_before = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self.rows,
            "best_epoch": self.best_epoch,
            # A duration, not a time: the clock's zero is another one in the process that resumes.
            "seconds": time.perf_counter() - self._epoch_started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["history"]
        self.best_epoch = state_dict["best_epoch"]
        self._seconds_before = state_dict["seconds"]

    def best_epochs(self) -> set[int]:
        """Return the best epoch, and the one that the checkpoint before the newest knows."""
        # If the newest checkpoint turns out to be damaged, the run resumes from the one before,
        # whose best epoch may be another and whose weights are then read from that epoch's
        # checkpoint.
        rows = self.rows[:-1] or self.rows
        before = max(rows, key=lambda row: float(row["val_accuracy"]), default={"epoch": 0})
        return {self.best_epoch, before["epoch"]}

    def writing(self) -> Callable[[], None]:
        """Return a function that writes ``metrics.csv`` with the rows that there are now."""
        # A copy of the list: a thread writes it while the next epoch appends to the list.
        return functools.partial(self.run.write_metrics, list(self.rows))

    def report_epoch(self, trainer: pl.Trainer) -> None:
        """Log the last epoch's row to trackers, and report it."""
        row = self.rows[-1]
        for logger in trainer.loggers:
            logger.log_metrics({k: float(v) for k, v in row.items()}, step=trainer.global_step)
        self.report(row)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A killed run may have written rows that its newest checkpoint does not have.
        if trainer.is_global_zero:
            self.writing()()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:  # only what a run keeps: trackers refuse to change it
            logger.log_hyperparams(self.config.computes())
        # Lightning does not call on_train_epoch_start for an epoch that is resumed in its middle.
        self._epoch_started = time.perf_counter() - self._seconds_before

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_started = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # At the epoch's end the schedule has stepped already: this is the rate that was used.
        self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            # The last steps may not have run yet; without this they would count as validation.
            torch.cuda.synchronize(pl_module.device)
        self._trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        # On every rank, although rank 0 alone writes: computing totals is a collective.
        end = EpochEnd(
            trainer,
            train=pl_module.totals_of("train").compute(),
            val=pl_module.totals_of("val").compute(),
            before=self.rows[-1] if self.rows else {},
            lr=self._lr,
            training_seconds=self._trained - self._epoch_started,
            seconds=time.perf_counter() - self._epoch_started,
        )
        row = {name: COLUMNS[name](end) for name in COLUMNS}
        self.rows.append(row)
        best = self.rows[self.best_epoch - 1]
        if not self.best_epoch or row["val_accuracy"] > best["val_accuracy"]:
            self.best_epoch = row["epoch"]
