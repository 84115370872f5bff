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

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.cache import CachedDataset
from cifar_dist.data.datamodule import PADDING
from cifar_dist.data.order import ORDER_VERSION
from cifar_dist.errors import Interrupted, RunFailed
from cifar_dist.events import Ask, Listener, Order, always_continue
from cifar_dist.inference.predictions import Predictions
from cifar_dist.model.classifier import Classifier
from cifar_dist.model.seeding import generator_states, restore_generators
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.storage import AnyPath, write_atomically
from cifar_dist.training.checkpoints import (
    IDENTITY,
    ORDER,
    BadCheckpoint,
    Checkpoints,
    checkpoint_as_bytes,
    read_checkpoint,
)
from cifar_dist.training.reading import Reading
from cifar_dist.training.writer import BackgroundWriter

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
        writer: writes all files but the first, beside training.
        ask: called on every rank after each step and epoch.

    Raises:
        Interrupted: on every rank, having saved a checkpoint, when ``ask`` says to stop.
        RunFailed: a file cannot be written; what was there is intact. Where the writer found it
            out, the run has trained for up to an epoch since.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: TrainConfig,
        identity: Mapping[str, Any],
        report: Callable[[dict[str, Any]], None],
        writer: BackgroundWriter,
        ask: Ask = always_continue,
    ) -> None:
        self.run = run
        self.config = config
        self.identity = identity
        self.report = report
        self.writer = writer
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
        checkpoint[IDENTITY] = {**self.identity, ORDER: ORDER_VERSION}

    @property
    def best(self) -> dict[str, Any]:
        """The row of the best epoch: highest validation accuracy, the earliest of equals."""
        return self.history[self.best_epoch - 1]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A killed run may have written rows that its newest checkpoint does not have, or have
        # died between a checkpoint and the files that follow it.
        if trainer.is_global_zero:
            self.run.write_metrics(self.history)
            self._restore_model_file()

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
        if order is not Order.CONTINUE or self._due_by_step(trainer):
            file = self.run.checkpoint(trainer.current_epoch + 1, batch_idx + 1)
            self._save_checkpoint(trainer, pl_module, file)
        if order is not Order.CONTINUE:
            self.writer.wait()  # whoever gave the order may end this process next
        if order is Order.STOP:
            raise Interrupted

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            # The last steps may not have run yet; without this they would count as validation.
            torch.cuda.synchronize(pl_module.device)
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
        if best:
            self.best_epoch = epoch
        over = epoch == trainer.max_epochs
        # Once the last epoch is over only the test is left, which takes less than resuming would.
        order = Order.CONTINUE if over else self.ask(trainer.global_step)
        every = self.config.checkpoint_epochs
        due = self._due_by_step(trainer) or (every is not None and epoch % every == 0)
        # The best epoch has a checkpoint too, and before its weights are written: a run that is
        # resumed from the newest one never finds weights of an epoch that it knows nothing of.
        if best or due or over or order is not Order.CONTINUE:
            self._save_checkpoint(trainer, pl_module, self.run.checkpoint(epoch), best)
        elif trainer.is_global_zero:
            rows = list(self.history)
            self.writer.submit(lambda: self.run.write_metrics(rows))
        for logger in trainer.loggers:
            logger.log_metrics({k: float(v) for k, v in row.items()}, step=trainer.global_step)
        self.report(row)
        if order is not Order.CONTINUE:
            self.writer.wait()
        if order is Order.STOP:
            raise Interrupted

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Every rank reads the best weights next.
        self.writer.wait()
        trainer.strategy.barrier("the last files are written")

    def rank_state(self, pl_module: Classifier) -> dict[str, Any]:
        """Return what this rank has that others have not, its tensors on the CPU.

        Pickled, a tensor of a GPU would be put on the GPU of that number in the process that
        gathers: it may have none of it, and else a context there takes half a gigabyte.
        """
        totals = pl_module.totals_of("train").state()
        return {
            "generators": generator_states(),
            "totals": _on_cpu(totals),
            "statistics": _on_cpu(dict(running_statistics(pl_module))),
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
        if totals[0].keys() != pl_module.totals_of("train").state().keys():
            pass  # of version 0.1.0, at an epoch's end, where nothing is counted
        elif same:
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
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, file: AnyPath, best: bool = False
    ) -> None:
        """Copy out the run's state, and have it written, with what follows from it.

        Args:
            file: the checkpoint.
            best: whether the epoch that ends here is the best one so far.
        """
        assert isinstance(pl_module, Classifier)
        self._ranks = _gathered(self.rank_state(pl_module), trainer.world_size)
        checkpoints = trainer.strategy.checkpoint_io
        assert isinstance(checkpoints, Checkpoints)
        # Before the copy is made: two of them may be more than the device has room for.
        self.writer.wait()
        trainer.save_checkpoint(str(file))  # every rank takes part, rank 0 copies
        self._ranks = []
        if not trainer.is_global_zero:
            return
        snapshot = checkpoints.taken()
        bests = {self.best_epoch, self._best_before()}
        at_epoch_end = not self.run.steps_into_epoch(file)
        rows = list(self.history)

        def write() -> None:
            content = snapshot.on_cpu()
            weights = b""
            if best:
                weights = network_as_bytes(content["state_dict"], self._kept_prefix)
                self._best_sha256 = hashlib.sha256(weights).hexdigest()
                content["callbacks"][self.state_key]["best_sha256"] = self._best_sha256
            write_atomically(file, checkpoint_as_bytes(content))
            # The one before the newest stays: the newest may turn out to be damaged.
            newest = self.run.checkpoints_newest_first()[:2]
            self.run.prune_checkpoints({*newest, *map(self.run.checkpoint, bests)})
            if best:
                write_atomically(self.run.model_file, weights)
            if at_epoch_end:
                self.run.write_metrics(rows)

        self.writer.submit(write)

    def _best_before(self) -> int:
        """The best epoch as the checkpoint before the newest knows it."""
        rows = self.history[:-1] or self.history
        return max(rows, key=lambda row: float(row["val_accuracy"]), default={"epoch": 0})["epoch"]

    @property
    def _kept_prefix(self) -> str:
        """What the kept network's weights are named in a checkpoint, see `Classifier.evaluated`."""
        return "average." if self.config.ema else "network."

    def _restore_model_file(self) -> None:
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
        write_atomically(file, network_as_bytes(state, self._kept_prefix))


def running_statistics(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The running means and variances of batch normalisation, by name."""
    return [
        (name, buffer)
        for name, buffer in module.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    ]


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors of one type to the CPU in one transfer: each would wait for the device."""
    if not tensors:
        return {}
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()]).cpu()
    parts = torch.split(flat, [tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view(tensor.shape).clone()
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }


def _gathered(mine: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    """Every rank's, in the order of ranks; on rank 0, else only this rank's."""
    if world_size == 1:
        return [mine]
    every: list[Any] | None = [None] * world_size if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(mine, every)
    return every or [mine]


class KeepPredictions(Callback):
    """Writes what the best epoch's weights answer to each test image; rank 0 does.

    A report is drawn from them without the network, e.g. where there is no GPU and no torch.

    Args:
        run: where to write.
        dataset: whose test images are gone through.
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
        self._logits.append(outputs.float())
        self._counts.append(batch.labels != PADDING)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Without the images that only fill up the last batch.
        pairs = zip(self._logits, self._counts, strict=True)
        mine = {"logits": [logits.cpu()[counts.cpu()] for logits, counts in pairs]}
        self._logits, self._counts = [], []
        ranks = _gathered(mine, trainer.world_size)
        if not trainer.is_global_zero:
            return
        # Every rank has a part of every batch, in the order of ranks.
        batches = zip(*(each["logits"] for each in ranks), strict=True)
        logits = torch.cat([part for batch in batches for part in batch]).numpy()
        images, members = self.dataset.part("test")
        answers = Predictions.of(
            "test",
            self.best_epoch,
            self.dataset.classes,
            logits,
            images.labels[members],
            images.images,
            members,
        )
        write_atomically(self.run.predictions_file, answers.to_bytes())


class StepEvents(Callback):
    """Reports a few times a second how far the epoch is; on rank 0.

    Loss (of that step) and accuracy (of the epoch so far) are this rank's. They are reported once
    the device has computed them, without waiting for it.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self._last = self._started = 0.0
        self._under_way: tuple[dict[str, Any], Reading] | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = self._last = time.perf_counter()
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
        if self._under_way is None and now - self._last >= SECONDS_BETWEEN_STEP_EVENTS:
            assert isinstance(pl_module, Classifier)
            done = batch_idx + 1
            scale = batch.global_size / trainer.world_size / len(batch.labels)
            event = {
                "kind": "step",
                "epoch": trainer.current_epoch + 1,
                "step": done,
                "images_per_second": done * pl_module.config.batch_size / (now - self._started),
            }
            loss = outputs["loss"].double() * scale
            running = pl_module.totals_of("train").running()
            self._under_way = event, Reading(torch.stack([loss, running]))
            self._last = now
        if self._under_way is not None and self._under_way[1].arrived:
            (event, reading), self._under_way = self._under_way, None
            loss_here, accuracy = reading.values()
            self.listener({**event, "loss": loss_here, "accuracy": accuracy})


def weights_as_bytes(network: nn.Module) -> bytes:
    """Return a network's weights and statistics as the bytes of a safetensors file.

    The same weights give the same bytes, so a SHA-256 of them tells whether two runs agree.
    """
    return network_as_bytes(network.state_dict())


def network_as_bytes(state: Mapping[str, Tensor], prefix: str = "") -> bytes:
    """Return the same of the network whose names begin so in a checkpoint's ``state_dict``."""
    return safetensors.torch.save(
        {
            name.removeprefix(prefix): value.detach().cpu().contiguous()
            for name, value in state.items()
            if name.startswith(prefix)
        }
    )
