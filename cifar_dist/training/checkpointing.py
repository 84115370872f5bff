"""When a run is saved, what is saved, and what is restored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.order import ORDER_VERSION
from cifar_dist.errors import Interrupted, RunFailed
from cifar_dist.events import Ask, Order
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
from cifar_dist.training.history import MetricsHistory
from cifar_dist.training.ranks import gathered, on_cpu, running_statistics
from cifar_dist.training.weights import network_as_bytes
from cifar_dist.training.writer import BackgroundWriter

SAVES = (Order.SAVE, Order.STOP)


class RunCheckpointer(Checkpoint):
    """Callback that saves checkpoints and the best weights, and restores each rank's own state.

    What differs between ranks is part of a checkpoint: generators, statistics of batch
    normalisation, what was counted in the epoch so far.

    Being a `Checkpoint` makes Lightning call it after all other callbacks.

    Args:
        run: where to write.
        config: the run's settings.
        identity: what the run computes, see `Checkpoints.find_checkpoint`.
        history: a callback before this one.
        writer: writes all files beside training.
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
        history: MetricsHistory,
        writer: BackgroundWriter,
        ask: Ask,
    ) -> None:
        self.run = run
        self.config = config
        self.identity = identity
        self.history = history
        self.writer = writer
        self.ask = ask
        self.unrestored: list[dict[str, Any]] = []
        """The ranks' own states as a checkpoint holds them, until training starts."""
        self._best_sha256 = ""

    def state_dict(self) -> dict[str, Any]:
        return {"best_sha256": self._best_sha256}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best_sha256 = state_dict["best_sha256"]
        self.unrestored = state_dict["ranks"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert isinstance(pl_module, Classifier)
        checkpoint[IDENTITY] = {**self.identity, ORDER: ORDER_VERSION}
        ranks = gathered(self.rank_state(pl_module), trainer.world_size)
        checkpoint["callbacks"][self.state_key]["ranks"] = ranks

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A killed run may have died between a checkpoint and the weights that follow it.
        if trainer.is_global_zero:
            self._restore_model_file()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.unrestored:
            # Restored last: anything between here and the first step would advance generators.
            self.restore_rank(trainer, pl_module, self.unrestored)
            self.unrestored = []

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
        # Every rank comes to the same decision here, since saving gathers all ranks' states: one
        # that did not take part would leave the others waiting in a collective.
        order = self.ask(trainer.global_step)
        if order in SAVES or self._due_by_step(trainer):
            self._save(trainer, self.run.checkpoint(trainer.current_epoch + 1, batch_idx + 1))
        self._obey(order)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        over = epoch == trainer.max_epochs
        # Once the last epoch is over only the test is left, which takes less than resuming would.
        order = None if over else self.ask(trainer.global_step)
        best = epoch == self.history.best_epoch
        every = self.config.checkpoint_epochs
        due = self._due_by_step(trainer) or (every is not None and epoch % every == 0)
        # The best epoch has a checkpoint too, and before its weights are written: a run that is
        # resumed from the newest one never finds weights of an epoch that it knows nothing of.
        if best or due or over or order in SAVES:
            self._save(trainer, self.run.checkpoint(epoch), best)
        elif trainer.is_global_zero:
            self.writer.submit(self.history.writing())
        # After the copy is made: what is reported may end this process, and the epoch is kept.
        self.history.report_epoch(trainer)
        self._obey(order)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Every rank reads the best weights next.
        self.writer.wait()
        trainer.strategy.barrier("the last files are written")

    def rank_state(self, pl_module: Classifier) -> dict[str, Any]:
        """Return what this rank has that others have not, its tensors on the CPU."""
        return {
            "generators": generator_states(),
            "totals": on_cpu(pl_module.totals_of("train").state()),
            "statistics": on_cpu(dict(running_statistics(pl_module))),
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

    def _obey(self, order: Order | None) -> None:
        if order in SAVES:
            self.writer.wait()  # whoever gave the order may end this process next
        if order is Order.STOP:
            raise Interrupted

    def _save(self, trainer: pl.Trainer, file: AnyPath, best: bool = False) -> None:
        """Copy out the run's state, and have it written, with what follows from it.

        Args:
            trainer: on every rank.
            file: the checkpoint.
            best: whether the epoch that ends here is the best one so far.
        """
        checkpoints = trainer.strategy.checkpoint_io
        assert isinstance(checkpoints, Checkpoints)
        # Before the copy is made: two of them may be more than the device has room for.
        self.writer.wait()
        trainer.save_checkpoint(str(file))  # every rank takes part, rank 0 copies
        if not trainer.is_global_zero:
            return
        snapshot = checkpoints.taken()
        bests = {self.run.checkpoint(epoch) for epoch in self.history.best_epochs()}
        at_epoch_end = not self.run.steps_into_epoch(file)
        write_metrics = self.history.writing()

        def write() -> None:
            content = snapshot.on_cpu()
            weights = self._best_weights(content) if best else b""
            write_atomically(file, checkpoint_as_bytes(content))
            # The one before the newest stays: the newest may turn out to be damaged.
            newest = self.run.checkpoints_newest_first()[:2]
            # Deleted only after the new one is on the disk: a kill in between leaves a file too
            # many, never one too few.
            self.run.prune_checkpoints({*newest, *bests})
            if best:
                write_atomically(self.run.model_file, weights)
            # After the checkpoint, which holds the same rows: a kill in between leaves metrics.csv
            # a row short, and a resumed run writes it anew.
            if at_epoch_end:
                write_metrics()

        self.writer.submit(write)

    def _best_weights(self, content: dict[str, Any]) -> bytes:
        """Return the weights in a checkpoint as a file's bytes, and note their digest there too."""
        weights = network_as_bytes(content["state_dict"], self._kept_prefix)
        self._best_sha256 = hashlib.sha256(weights).hexdigest()
        content["callbacks"][self.state_key]["best_sha256"] = self._best_sha256
        return weights

    @property
    def _kept_prefix(self) -> str:
        """Return the prefix of the kept network's names, see `Classifier.evaluated`."""
        return "average." if self.config.ema else "network."

    def _restore_model_file(self) -> None:
        """Make sure that ``model.safetensors`` holds the best epoch's weights."""
        file, best_epoch = self.run.model_file, self.history.best_epoch
        if not best_epoch or (
            file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == self._best_sha256
        ):
            return
        checkpoint = self.run.checkpoint(best_epoch)
        try:
            state = read_checkpoint(checkpoint)["state_dict"]
        except BadCheckpoint as error:
            raise RunFailed(
                f"{file}: is not of the best epoch, {best_epoch}, and {checkpoint} {error}"
            ) from None
        write_atomically(file, network_as_bytes(state, self._kept_prefix))
