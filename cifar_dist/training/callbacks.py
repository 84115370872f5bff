"""Small additions to the training loop: averaged statistics, predictions, progress."""

from __future__ import annotations

import functools
import time
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from cifar_dist.data.cache import CachedDataset
from cifar_dist.data.datamodule import PADDING
from cifar_dist.events import Listener, StepDone
from cifar_dist.inference.predictions import Predictions
from cifar_dist.model.classifier import Classifier
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.storage import write_atomically
from cifar_dist.training.ranks import gathered, running_statistics
from cifar_dist.training.reading import Reading

SECONDS_BETWEEN_STEP_EVENTS = 0.5


class CountProgress(Callback):
    """Callback that counts how far this rank is, for whoever looks for one that hangs.

    Ranks wait for each other in the middle of a step, in its backward pass. So parts of a step
    count, too: a rank that hangs before has done as many steps as those that wait for it.
    """

    def __init__(self) -> None:
        self.marks = 0
        """Of parts of steps; it only grows."""
        self.usual_s: float | None = None
        """Mean time of a step here, also one of validation or test; None before the first one."""
        self._began: float | None = None
        self._steps = 0

    def _begin(self) -> None:
        self.marks += 1
        if self._began is None:
            self._began = time.monotonic()

    def _end(self) -> None:
        assert self._began is not None
        self.marks += 1
        self._steps += 1
        self.usual_s = (time.monotonic() - self._began) / self._steps

    def on_train_batch_start(self, *args: Any) -> None:
        self._begin()

    def on_before_backward(self, *args: Any) -> None:
        self.marks += 1

    def on_after_backward(self, *args: Any) -> None:
        self.marks += 1

    def on_train_batch_end(self, *args: Any) -> None:
        self._end()

    def on_validation_batch_start(self, *args: Any) -> None:
        self._begin()

    def on_validation_batch_end(self, *args: Any) -> None:
        self._end()

    def on_test_batch_start(self, *args: Any) -> None:
        self._begin()

    def on_test_batch_end(self, *args: Any) -> None:
        self._end()


class AverageBatchNorm(Callback):
    """Callback that averages batch normalisation's statistics over ranks before validation.

    Each rank sees only its part of the images. Without this, the statistics that are evaluated and
    saved would be those of rank 0's part alone.
    """

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size == 1:
            return
        if statistics := [buffer for _, buffer in running_statistics(pl_module)]:
            # One all-reduce in place of one for each statistic, of which a ResNet-18 has forty.
            flat = torch.cat([buffer.reshape(-1) for buffer in statistics])
            torch.distributed.all_reduce(flat)
            flat /= trainer.world_size
            parts = torch.split(flat, [buffer.numel() for buffer in statistics])
            for buffer, part in zip(statistics, parts, strict=True):
                buffer.copy_(part.view_as(buffer))


class KeepPredictions(Callback):
    """Callback that writes the best epoch's predictions for the test images, on rank 0.

    A report is drawn from them without the network, e.g. where there is no GPU and no torch.

    Args:
        run: where to write.
        dataset: whose test images are predicted.
        best_epoch: 1-based.

    Raises:
        RunFailed: the file cannot be written.
    """

    def __init__(self, run: RunDirectory, dataset: CachedDataset, best_epoch: int) -> None:
        self.run = run
        self.dataset = dataset
        self.best_epoch = best_epoch
        self._logits: list[Tensor] = []
        self._counts: list[Tensor] = []

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Kept on the device until the epoch's end: a copy of each batch would make it wait.
        # Float32, since NumPy has no bfloat16.
        self._logits.append(outputs.float())
        self._counts.append(batch.labels != PADDING)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Without the padding of the last batch.
        pairs = zip(self._logits, self._counts, strict=True)
        mine = {"logits": [logits.cpu()[counts.cpu()] for logits, counts in pairs]}
        self._logits, self._counts = [], []
        ranks = gathered(mine, trainer.world_size)
        if not trainer.is_global_zero:
            return
        # Every rank has a part of every batch, in the order of ranks.
        batches = zip(*(each["logits"] for each in ranks), strict=True)
        logits = torch.cat([part for batch in batches for part in batch]).numpy()
        predictions = Predictions.of_split(self.dataset, "test", self.best_epoch, logits)
        write_atomically(self.run.predictions_file, predictions.to_bytes())


class StepEvents(Callback):
    """Callback that reports a few times a second how far the epoch is; on rank 0.

    Loss (of that step) and accuracy (of the epoch so far) are this rank's. They are reported once
    the device has computed them, without waiting for it.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self._last = self._started = 0.0
        self._done_before = 0
        self._under_way: tuple[functools.partial[StepDone], Reading] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning does not call on_train_epoch_start for an epoch that is resumed in its middle,
        # whose first steps took none of this process's time.
        self.on_train_epoch_start(trainer, pl_module)
        self._done_before = trainer.fit_loop.epoch_loop.batch_progress.current.completed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A reading left from the epoch before would be reported after that epoch's row.
        self._started = self._last = time.perf_counter()
        self._done_before = 0
        self._under_way = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now = time.perf_counter()
        # One reading at a time, so that events stay in order and a device that lags is not asked
        # again before it has answered.
        if self._under_way is None and now - self._last >= SECONDS_BETWEEN_STEP_EVENTS:
            assert isinstance(pl_module, Classifier)
            done = batch_idx + 1
            # `training_step` scales its loss to this rank's part of the global mean; undone, it is
            # the mean over this rank's images.
            scale = batch.global_size / trainer.world_size / len(batch.labels)
            images = (done - self._done_before) * pl_module.config.batch_size
            event = functools.partial(
                StepDone,
                epoch=trainer.current_epoch + 1,
                step=done,
                images_per_second=images / (now - self._started),
            )
            # Both numbers go in one transfer; the running accuracy is float64 already.
            loss = outputs["loss"].double() * scale
            running = pl_module.totals_of("train").running()
            self._under_way = event, Reading(torch.stack([loss, running]))
            self._last = now
        if self._under_way is not None and self._under_way[1].arrived:
            (event, reading), self._under_way = self._under_way, None
            loss_here, accuracy = reading.values()
            self.listener(event(loss=loss_here, accuracy=accuracy))
