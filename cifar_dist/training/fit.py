"""One worker's whole part in a run: config to objects to ``Trainer.fit`` to outcome.

The same function trains alone in a notebook and as one of many workers of a cluster: how
workers communicate is in the strategy and plugins that it is given.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from safetensors.torch import load

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.cache import CachedDataset
from cifar_dist.data.datamodule import ImageDataModule
from cifar_dist.errors import UserError
from cifar_dist.events import Ask, EpochDone, Listener, Started, always_continue, ignore
from cifar_dist.model.classifier import Classifier
from cifar_dist.model.networks import make_network
from cifar_dist.model.seeding import nondeterminism_reported, set_seed
from cifar_dist.model.synchronized import synchronize
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.runs.metrics import Outcome
from cifar_dist.training.alone import Alone, only_given_settings
from cifar_dist.training.averaging import AverageWeights
from cifar_dist.training.callbacks import (
    AverageBatchNorm,
    CountProgress,
    KeepPredictions,
    StepEvents,
)
from cifar_dist.training.checkpointing import RunCheckpointer
from cifar_dist.training.checkpoints import Checkpoints
from cifar_dist.training.environment import environment
from cifar_dist.training.graphs import ReplayGraphs
from cifar_dist.training.history import MetricsHistory, Report
from cifar_dist.training.lightning_steps import NoProfiler
from cifar_dist.training.memory import freed_memory_kept
from cifar_dist.training.nonfinite import SkipNonFinite, StopOnNonFinite
from cifar_dist.training.trackers import make_logger
from cifar_dist.training.weights import weights_as_bytes
from cifar_dist.training.writer import BackgroundWriter
from cifar_dist.variables import variables_restored


@variables_restored("PYTHONHASHSEED")
def fit(
    config: TrainConfig,
    run: RunDirectory,
    dataset: CachedDataset,
    *,
    rank: int = 0,
    strategy: str | Strategy = "auto",
    plugins: Sequence[Any] = (),
    launched: Mapping[str, Any] | None = None,
    listener: Listener = ignore,
    report: Report = lambda row: None,
    ask: Ask = always_continue,
    progress: CountProgress | None = None,
    test: bool = True,
) -> Outcome:
    """Train to the last epoch, resuming from the run's newest checkpoint, and test once.

    Args:
        config: the run's settings.
        run: its directory, which all ranks see; rank 0 writes.
        dataset: the data set on this node.
        rank: this process's, from 0.
        strategy, plugins: Lightning's, for more than one process.
        launched: what the driver adds to ``environment.json``, e.g. the command.
        listener: notified of progress, on rank 0.
        report: called on every rank with each epoch's row; what it raises ends the training.
        ask: called on every rank after each step and epoch; says whether to save or stop there.
        progress: counts how far this rank is, where somebody watches.
        test: measure the best epoch's weights on the test images, which trials do not touch.

    Returns:
        The same on every rank.

    Raises:
        UserError: weights that do not fit, no GPU, too many ranks for the batch size, or only
            checkpoints that cannot be used.
        Diverged: the loss is no longer finite.
        Interrupted: on every rank, having saved a checkpoint, when ``ask`` says to stop.
        RunFailed: a file cannot be written.
    """
    if not config.verbose:
        _silence_lightning()
    if config.use_gpu and not torch.cuda.is_available():
        raise UserError("--use-gpu: torch finds no GPU here; omit it to train on the CPU")
    heard = listener if rank == 0 else ignore
    # Before the network is made, whose weights come from torch's generator. Ranks make different
    # ones, and DDP replaces them by rank 0's.
    set_seed(config.seed + rank, config.deterministic, config.tf32)
    parts = _assembled(config, run, dataset, rank, strategy, plugins, heard, report, ask, progress)
    if rank == 0:
        run.remove_leftovers()
        run.write_environment(_environment(dataset, launched or {}))
    found = parts.find_checkpoint(run, rank, heard)
    heard(Started(parts.trainer.world_size, found))
    undetermined = functools.partial(nondeterminism_reported, heard, set())
    with freed_memory_kept(), parts.writer, undetermined():
        parts.trainer.fit(parts.module, parts.images, ckpt_path=found, weights_only=True)

    # Before the test, which loads the best epoch's weights in place of the last step's.
    weights_sha256 = hashlib.sha256(weights_as_bytes(parts.module.evaluated)).hexdigest()
    tested: Mapping[str, Any] = {"accuracy": None, "loss": None, "images": 0}
    if test:
        with undetermined():
            tested = _tested(parts, run, dataset)
    return Outcome(
        history=parts.history.rows,
        best_epoch=parts.history.best_epoch,
        test_accuracy=tested["accuracy"],
        test_loss=tested["loss"],
        test_images=int(tested["images"]),
        weights_sha256=weights_sha256,
        skipped_updates=parts.skips.skipped,
    )


@dataclass(frozen=True)
class _Parts:
    """The objects that train together, of one rank."""

    module: Classifier
    images: ImageDataModule
    trainer: pl.Trainer
    history: MetricsHistory
    skips: SkipNonFinite
    writer: BackgroundWriter
    checkpoints: Checkpoints
    identity: Mapping[str, Any]

    def find_checkpoint(self, run: RunDirectory, rank: int, listener: Listener) -> str | None:
        """Return the checkpoint that rank 0 finds, on every rank; only rank 0 raises."""
        found: list[str | None] = [None]
        if rank == 0:
            weights = self.module.state_dict()
            file = self.checkpoints.find_checkpoint(run, self.identity, weights, listener)
            found = [None if file is None else str(file)]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(found)
        return found[0]


def _assembled(
    config: TrainConfig,
    run: RunDirectory,
    dataset: CachedDataset,
    rank: int,
    strategy: str | Strategy,
    plugins: Sequence[Any],
    listener: Listener,
    report: Report,
    ask: Ask,
    progress: CountProgress | None,
) -> _Parts:
    """Make what trains; the arguments are those of `fit`."""
    module = _classifier(config, dataset)
    identity = {**config.computes(), "dataset_fingerprint": dataset.fingerprint}
    writer, checkpoints = BackgroundWriter(), Checkpoints()
    history = MetricsHistory(run, config, _reporting(listener, report))
    skips = SkipNonFinite(listener, config.on_nonfinite == "skip")
    callbacks = [
        *([] if progress is None else [progress]),
        skips,
        *_chosen_callbacks(config, run, writer, distributed=strategy != "auto"),
        history,
        RunCheckpointer(run, config, identity, history, writer, ask),
    ]
    if rank == 0:
        callbacks.append(StepEvents(listener))
    logger = make_logger(config.logger, run) if rank == 0 else None
    plugins = [*(plugins or [Alone()]), checkpoints]
    trainer = _trainer(config, strategy, plugins, callbacks, logger)
    # Known only now: with the precision the trainer chooses whether there is a gradient scaler.
    if not skips.active(trainer):
        trainer.callbacks.remove(skips)  # type: ignore[attr-defined]
    images = ImageDataModule(config, dataset)
    return _Parts(module, images, trainer, history, skips, writer, checkpoints, identity)


def _classifier(config: TrainConfig, dataset: CachedDataset) -> Classifier:
    network = make_network(config.network, len(dataset.classes), config.stem, config.weights)
    if config.sync_batchnorm:
        synchronize(network)
    if config.channels_last:
        network = network.to(memory_format=torch.channels_last)
    module = Classifier(network, config, dataset.steps_per_epoch(config.batch_size))
    if config.compile:
        for each in {module.network, module.evaluated}:
            # The epoch's last batch may be smaller. By default torch would then compile a graph for
            # any size, which would serve all later batches, only slower.
            each.compile(dynamic=False)
    return module


def _chosen_callbacks(
    config: TrainConfig, run: RunDirectory, writer: BackgroundWriter, distributed: bool
) -> list[pl.Callback]:
    """Return the callbacks that settings ask for.

    Lightning calls every callback at six places in a step, so there is none that has no use.
    """
    callbacks: list[pl.Callback] = []
    if config.on_nonfinite == "stop":
        callbacks.append(StopOnNonFinite(run, writer))
    if config.ema:  # after `SkipNonFinite`, which undoes a step's statistics
        callbacks.append(AverageWeights(config.ema))
    if _replays_graphs(config, distributed):
        callbacks.append(ReplayGraphs())
    if distributed and not config.sync_batchnorm:  # else they are the same on all ranks
        callbacks.append(AverageBatchNorm())
    return callbacks


def _replays_graphs(config: TrainConfig, distributed: bool) -> bool:
    if config.cuda_graphs != "auto":
        return config.cuda_graphs == "on"
    # Not in several workers: DDP could exchange no gradient before the last one is there.
    return config.use_gpu and not (config.compile or config.sync_batchnorm or distributed)


def _trainer(
    config: TrainConfig,
    strategy: str | Strategy,
    plugins: list[Any],
    callbacks: list[pl.Callback],
    logger: Logger | None,
) -> pl.Trainer:
    with only_given_settings():
        trainer = pl.Trainer(
            max_epochs=config.max_epochs,
            accelerator="gpu" if config.use_gpu else "cpu",
            devices=1 if strategy == "auto" else "auto",
            strategy=strategy,
            plugins=plugins,
            precision=config.precision,
            callbacks=callbacks,
            use_distributed_sampler=False,  # the data module shards, and counts each image once
            # Validation before the first step would be counted in the first epoch's totals.
            num_sanity_val_steps=0,
            logger=logger or False,
            enable_progress_bar=False,
            enable_model_summary=False,
            profiler=NoProfiler(),
        )
    # Lightning would end the run on SIGTERM by itself, at an epoch's end and with exit 0. Signals
    # are handled by whoever called `fit`.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    # So there is no signal to broadcast to other ranks, for which Lightning 2.6 would make a GPU
    # finish every step before the next is prepared.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def _environment(dataset: CachedDataset, launched: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **environment(),
        "dataset_fingerprint": dataset.fingerprint,
        # So that the model can be used where its data set is not.
        "dataset": dataset.about._asdict(),
        **launched,
    }


def _tested(parts: _Parts, run: RunDirectory, dataset: CachedDataset) -> dict[str, float]:
    """Test the best epoch's weights, and keep their predictions."""
    parts.module.evaluated.load_state_dict(load(run.model_file.read_bytes()))
    kept = KeepPredictions(run, dataset, parts.history.best_epoch)
    # Added for the test alone: Lightning would call it at every training step as well.
    parts.trainer.callbacks.append(kept)  # type: ignore[attr-defined]
    parts.trainer.test(parts.module, parts.images, verbose=False)
    return parts.module.tested


def _reporting(listener: Listener, report: Report) -> Report:
    def report_row(row: dict[str, Any]) -> None:
        # The listener first, since `report` may raise to end the training: the epoch is over all
        # the same.
        listener(EpochDone(row))
        report(row)

    return report_row


def _silence_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", module="torchmetrics")
    warnings.filterwarnings("ignore", module="torch")
