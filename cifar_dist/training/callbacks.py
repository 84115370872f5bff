"""What happens around the training steps: the record of a run, its checkpoints, its events."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import safetensors.torch
import torch
import torch.distributed
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor, nn

from cifar_dist.errors import Diverged
from cifar_dist.events import Listener
from cifar_dist.model.classifier import Classifier
from cifar_dist.runs import RunDirectory, aside_of, write_atomically

SECONDS_BETWEEN_STEP_EVENTS = 0.5


class AverageBatchNorm(Callback):
    """Give all ranks the mean of their batch normalisation statistics before each validation.

    Each rank sees its part of the images only. Without this, what is evaluated and saved
    would rest on rank 0's part alone.
    """

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size == 1:
            return
        statistics = [
            buffer
            for name, buffer in pl_module.named_buffers()
            if name.endswith(("running_mean", "running_var"))
        ]
        if statistics:
            flat = torch.cat([buffer.reshape(-1) for buffer in statistics])
            torch.distributed.all_reduce(flat)
            flat /= trainer.world_size
            parts = torch.split(flat, [buffer.numel() for buffer in statistics])
            for buffer, part in zip(statistics, parts, strict=True):
                buffer.copy_(part.view_as(buffer))


class Record(Checkpoint):
    """Keeps a run's history, and writes it, the checkpoints and the best weights at epochs' ends.

    Every rank holds the history; rank 0 writes. It is part of the checkpoint, so what a resumed
    run writes begins where the checkpoint was taken: no row is lost or doubled.

    Being a `Checkpoint` makes Lightning call it after all other callbacks.

    Args:
        run: where to write.
        checkpoint_every: epochs between two checkpoints; the best and the last one always have one.
        report: called on every rank with each epoch's row.

    Raises:
        Diverged: on every rank, at the end of an epoch whose loss is not finite.
    """

    def __init__(
        self, run: RunDirectory, checkpoint_every: int, report: Callable[[dict[str, Any]], None]
    ) -> None:
        self.run = run
        self.checkpoint_every = checkpoint_every
        self.report = report
        self.history: list[dict[str, Any]] = []
        self.best_epoch = 0
        self._lr = 0.0
        self._epoch_started = self._trained = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]
        self.best_epoch = state_dict["best_epoch"]

    @property
    def best(self) -> dict[str, Any]:
        """The row of the best epoch: highest validation accuracy, the earliest of equals."""
        return self.history[self.best_epoch - 1]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A killed run may have written rows that its newest checkpoint does not have.
        if trainer.is_global_zero:
            self.run.write_metrics(self.history)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_started = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Schedules step before an epoch's end is told: this is the rate that was used.
        self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        train = pl_module.totals_of("train").compute()
        val = pl_module.totals_of("val").compute()
        if not math.isfinite(train["loss"]):
            raise Diverged(
                f"the loss of epoch {trainer.current_epoch + 1} is {train['loss']} (lr "
                f"{self._lr:g}); lower --lr, or change the precision"
            )
        samples = self.history[-1]["samples"] if self.history else 0
        epoch = trainer.current_epoch + 1
        row = {
            "epoch": epoch,
            "step": trainer.global_step,
            "samples": samples + train["images"],
            "world_size": trainer.world_size,
            "lr": self._lr,
            "train_loss": train["loss"],
            "train_accuracy": train["accuracy"],
            "val_loss": val["loss"],
            "val_accuracy": val["accuracy"],
            "images_per_second": train["images"] / (self._trained - self._epoch_started),
            "seconds": time.perf_counter() - self._epoch_started,
        }
        self.history.append(row)
        best = not self.best_epoch or val["accuracy"] > self.best["val_accuracy"]
        if best:
            self.best_epoch = epoch
        # The best epoch has a checkpoint too, and before its weights are written: a run that goes
        # on from the newest one never finds weights of an epoch that it knows nothing of.
        if best or epoch % self.checkpoint_every == 0 or epoch == trainer.max_epochs:
            self._save_checkpoint(trainer, epoch)
        if best and trainer.is_global_zero:
            write_atomically(self.run.model_file, weights_as_bytes(pl_module.network))
        if trainer.is_global_zero:
            self.run.write_metrics(self.history)
        self.report(row)

    def _save_checkpoint(self, trainer: pl.Trainer, epoch: int) -> None:
        file = self.run.checkpoint(epoch)
        aside = aside_of(file)
        trainer.save_checkpoint(aside)  # every rank takes part, rank 0 writes
        if trainer.is_global_zero:
            os.replace(aside, file)
            self.run.prune_checkpoints(keep={epoch, self.best_epoch})


class StepEvents(Callback):
    """Tells a listener now and then how far the epoch is; on rank 0.

    The loss is that of the last step, on this rank. Reading it makes a GPU finish what it
    does, so it is read a few times a second, not at each step.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self._said = self._started = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = self._said = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now = time.perf_counter()
        if now - self._said < SECONDS_BETWEEN_STEP_EVENTS:
            return
        assert isinstance(pl_module, Classifier)
        loss: Tensor = outputs["loss"]
        done = batch_idx + 1
        self.listener(
            {
                "kind": "step",
                "epoch": trainer.current_epoch + 1,
                "step": done,
                "loss": float(loss) * batch.global_size / trainer.world_size / len(batch.labels),
                "accuracy": pl_module.totals_of("train").accuracy_here(),
                "images_per_second": done * pl_module.config.batch_size / (now - self._started),
            }
        )
        self._said = now


def weights_as_bytes(network: nn.Module) -> bytes:
    """A network's weights and statistics as the bytes of a safetensors file.

    The same weights give the same bytes, so a SHA-256 of them tells whether two runs agree.
    """
    return safetensors.torch.save(
        {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    )
