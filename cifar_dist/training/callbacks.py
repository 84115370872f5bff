"""What happens around the training steps: the record of a run, its checkpoints, its events."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import safetensors.torch
import torch
import torch.distributed
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor, nn

from cifar_dist.config import TrainConfig
from cifar_dist.data.cache import CachedDataset
from cifar_dist.data.datamodule import PADDING
from cifar_dist.errors import Interrupted, RunFailed
from cifar_dist.events import Ask, Listener, Order, go_on
from cifar_dist.model.answers import Answers
from cifar_dist.model.classifier import Classifier
from cifar_dist.runs import RunDirectory
from cifar_dist.storage import AnyPath, write_atomically
from cifar_dist.training.checkpoints import (
    IDENTITY,
    BadCheckpoint,
    read_checkpoint,
)
from cifar_dist.training.seeding import generator_states, restore_generators

SECONDS_BETWEEN_STEP_EVENTS = 0.5


class AverageBatchNorm(Callback):
    """Give all ranks the mean of their batch normalisation statistics before each validation.

    Each rank sees its part of the images only. Without this, what is evaluated and saved
    would rest on rank 0's part alone.
    """

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size == 1:
            return
        if statistics := [buffer for _, buffer in running_statistics(pl_module)]:
            flat = torch.cat([buffer.reshape(-1) for buffer in statistics])
            torch.distributed.all_reduce(flat)
            flat /= trainer.world_size
            parts = torch.split(flat, [buffer.numel() for buffer in statistics])
            for buffer, part in zip(statistics, parts, strict=True):
                buffer.copy_(part.view_as(buffer))


class Record(Checkpoint):
    """Keeps a run's history, and writes it, the checkpoints and the best weights.

    Every rank holds the history; rank 0 writes. It is part of the checkpoint, so what a resumed
    run writes begins where the checkpoint was taken: no row is lost or doubled. So is what
    differs between ranks: generators, statistics of batch normalisation, what was counted in the
    epoch so far.

    Being a `Checkpoint` makes Lightning call it after all other callbacks.

    Args:
        run: where to write.
        config: the run's settings.
        identity: what the run computes, see `find_checkpoint`.
        report: called on every rank with each epoch's row.
        ask: called on every rank behind each step and epoch.

    Raises:
        Interrupted: on every rank, having saved a checkpoint, when ``ask`` says to stop.
        RunFailed: a file cannot be written; what was there is intact.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: TrainConfig,
        identity: Mapping[str, Any],
        report: Callable[[dict[str, Any]], None],
        ask: Ask = go_on,
    ) -> None:
        self.run = run
        self.config = config
        self.identity = identity
        self.report = report
        self.ask = ask
        self.history: list[dict[str, Any]] = []
        self.best_epoch = 0
        self._best_sha256 = ""
        self._ranks: list[dict[str, Any]] = []
        self._lr = 0.0
        self._epoch_started = self._trained = 0.0
        self._seconds_before = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_sha256": self._best_sha256,
            "ranks": self._ranks,
            "seconds": time.perf_counter() - self._epoch_started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]
        self.best_epoch = state_dict["best_epoch"]
        self._best_sha256 = state_dict["best_sha256"]
        self._ranks = state_dict["ranks"]
        self._seconds_before = state_dict["seconds"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[IDENTITY] = dict(self.identity)

    @property
    def best(self) -> dict[str, Any]:
        """The row of the best epoch: highest validation accuracy, the earliest of equals."""
        return self.history[self.best_epoch - 1]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A killed run may have written rows that its newest checkpoint does not have, or have
        # died between a checkpoint and the files that follow it.
        if trainer.is_global_zero:
            self.run.write_metrics(self.history)
            assert isinstance(pl_module, Classifier)
            self._restore_model_file(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:  # only what a run keeps: trackers refuse to change it
            logger.log_hyperparams(self.config.computes())
        # Where an epoch is gone on with, its start is not told.
        self._epoch_started = time.perf_counter() - self._seconds_before
        if self._ranks:
            # Here, since nothing draws random numbers any more before the first step does.
            self.restore_rank(trainer, pl_module, self._ranks)
            self._ranks = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_started = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Schedules step before an epoch's end is told: this is the rate that was used.
        self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.is_last_batch:
            return  # the epoch's end follows
        order = self.ask(trainer.global_step)
        if order is not Order.GO_ON or self._due_by_step(trainer):
            file = self.run.checkpoint(trainer.current_epoch + 1, batch_idx + 1)
            self._save_checkpoint(trainer, pl_module, file)
        if order is Order.STOP:
            raise Interrupted

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        train = pl_module.totals_of("train").compute()
        val = pl_module.totals_of("val").compute()
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
        weights = weights_as_bytes(pl_module.evaluated) if best else b""
        if best:
            self.best_epoch = epoch
            self._best_sha256 = hashlib.sha256(weights).hexdigest()
        over = epoch == trainer.max_epochs
        # Once the last epoch is over only the test is left, which takes less than going on would.
        order = Order.GO_ON if over else self.ask(trainer.global_step)
        every = self.config.checkpoint_epochs
        due = self._due_by_step(trainer) or (every is not None and epoch % every == 0)
        # The best epoch has a checkpoint too, and before its weights are written: a run that goes
        # on from the newest one never finds weights of an epoch that it knows nothing of.
        if best or due or over or order is not Order.GO_ON:
            self._save_checkpoint(trainer, pl_module, self.run.checkpoint(epoch))
        if trainer.is_global_zero:
            if best:
                write_atomically(self.run.model_file, weights)
            self.run.write_metrics(self.history)
        for logger in trainer.loggers:
            logger.log_metrics({k: float(v) for k, v in row.items()}, step=trainer.global_step)
        self.report(row)
        if order is Order.STOP:
            raise Interrupted

    def rank_state(self, pl_module: Classifier) -> dict[str, Any]:
        """What this rank has that others have not."""
        return {
            "generators": generator_states(),
            "totals": pl_module.totals_of("train").state(),
            "statistics": {name: buffer.cpu() for name, buffer in running_statistics(pl_module)},
        }

    def restore_rank(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, ranks: list[dict[str, Any]]
    ) -> None:
        """Put this rank where its checkpoint found it.

        With another number of ranks than the checkpoint's each takes the mean of the statistics,
        and rank 0 takes what all have counted.
        """
        assert isinstance(pl_module, Classifier)
        rank, same = trainer.global_rank, len(ranks) == trainer.world_size
        for name, buffer in running_statistics(pl_module):
            mine = [ranks[rank]] if same else ranks
            buffer.copy_(torch.stack([each["statistics"][name] for each in mine]).mean(0))
        totals = [each["totals"] for each in ranks]
        if same:
            pl_module.totals_of("train").restore(totals[rank])
        elif rank == 0:
            summed = {name: sum(each[name] for each in totals) for name in totals[0]}
            pl_module.totals_of("train").restore(summed)
        if rank < len(ranks):  # a rank that is new has seeded its generators
            restore_generators(ranks[rank]["generators"])

    def _due_by_step(self, trainer: pl.Trainer) -> bool:
        every = self.config.checkpoint_steps
        return every is not None and trainer.global_step % every == 0

    def _save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, file: AnyPath
    ) -> None:
        assert isinstance(pl_module, Classifier)
        self._ranks = _gathered(self.rank_state(pl_module), trainer.world_size)
        trainer.save_checkpoint(str(file))  # every rank takes part, rank 0 writes
        self._ranks = []
        if trainer.is_global_zero:
            # The one before the newest stays: the newest may turn out to be damaged.
            newest = self.run.checkpoints_newest_first()[:2]
            best = {self.best_epoch, self._best_before()}
            self.run.prune_checkpoints({*newest, *map(self.run.checkpoint, best)})

    def _best_before(self) -> int:
        """The best epoch as the checkpoint before the newest knows it."""
        rows = self.history[:-1] or self.history
        return max(rows, key=lambda row: float(row["val_accuracy"]), default={"epoch": 0})["epoch"]

    def _restore_model_file(self, module: Classifier) -> None:
        """See that ``model.safetensors`` holds the best epoch's weights."""
        file = self.run.model_file
        if not self.best_epoch or (
            file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == self._best_sha256
        ):
            return
        checkpoint = self.run.checkpoint(self.best_epoch)
        try:
            state = read_checkpoint(checkpoint)["state_dict"]
        except BadCheckpoint as error:
            raise RunFailed(
                f"{file}: is not of the best epoch, {self.best_epoch}, and {checkpoint} {error}"
            ) from None
        prefix = "network." if module.average is None else "average."
        write_atomically(
            file,
            safetensors.torch.save(
                {
                    name.removeprefix(prefix): value
                    for name, value in state.items()
                    if name.startswith(prefix)
                }
            ),
        )


def running_statistics(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The running means and variances of batch normalisation, by name."""
    return [
        (name, buffer)
        for name, buffer in module.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    ]


def _gathered(mine: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    """Every rank's, in the order of ranks; on rank 0, else only this rank's."""
    if world_size == 1:
        return [mine]
    every: list[Any] | None = [None] * world_size if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(mine, every)
    return every or [mine]


class KeepAnswers(Callback):
    """Writes what the best epoch's weights answer to each test image; rank 0 does.

    A report is drawn from them without the network, e.g. where there is no GPU and no torch.

    Args:
        run: where to write.
        dataset: whose test images are gone through.
        best_epoch: 1-based; asked for when the test is over.

    Raises:
        RunFailed: the file cannot be written.
    """

    def __init__(
        self, run: RunDirectory, dataset: CachedDataset, best_epoch: Callable[[], int]
    ) -> None:
        self.run = run
        self.dataset = dataset
        self.best_epoch = best_epoch
        self._logits: list[Tensor] = []

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Without the images that only fill up the last batch.
        self._logits.append(outputs[batch.labels != PADDING].float())

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        mine = {"logits": [part.cpu() for part in self._logits]}
        self._logits = []
        ranks = _gathered(mine, trainer.world_size)
        if not trainer.is_global_zero:
            return
        # Every rank has a part of every batch, in the order of ranks.
        batches = zip(*(each["logits"] for each in ranks), strict=True)
        logits = torch.cat([part for batch in batches for part in batch]).numpy()
        images, members = self.dataset.part("test")
        answers = Answers.of(
            "test",
            self.best_epoch(),
            self.dataset.classes,
            logits,
            images.labels[members],
            images.images,
            members,
        )
        write_atomically(self.run.answers_file, answers.to_bytes())


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
