"""One worker's whole part in a run: config to objects to ``Trainer.fit`` to outcome.

The same function trains alone in a notebook and as one of many workers of a cluster: how
workers talk to each other is in the strategy and plugins that it is given.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.strategies import Strategy
from safetensors.torch import load

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.cache import CachedDataset
from cifar_dist.data.datamodule import ImageDataModule
from cifar_dist.errors import UserError
from cifar_dist.events import Ask, Listener, always_continue, ignore
from cifar_dist.model.classifier import Classifier
from cifar_dist.model.resnet import resnet18
from cifar_dist.model.seeding import nondeterminism_reported, set_seed
from cifar_dist.model.synchronized import synchronize
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.runs.metrics import Outcome
from cifar_dist.storage import AnyPath
from cifar_dist.training.averaging import AverageWeights
from cifar_dist.training.callbacks import (
    AverageBatchNorm,
    KeepPredictions,
    Record,
    StepEvents,
    weights_as_bytes,
)
from cifar_dist.training.checkpoints import Checkpoints
from cifar_dist.training.environment import environment
from cifar_dist.training.lightning_steps import NoProfiler
from cifar_dist.training.memory import freed_memory_kept
from cifar_dist.training.nonfinite import SkipNonFinite, StopOnNonFinite
from cifar_dist.training.trackers import make_logger
from cifar_dist.training.writer import BackgroundWriter


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
    report: Callable[[dict[str, Any]], None] = ignore,
    ask: Ask = always_continue,
    test: bool = True,
) -> Outcome:
    """Train to the last epoch, going on from the run's newest checkpoint, and test once.

    Args:
        config: the run's settings.
        run: its directory, which all ranks see; rank 0 writes.
        dataset: the data set on this node.
        rank: this process's, from 0.
        strategy, plugins: Lightning's, for more than one process.
        launched: what the driver adds to ``environment.json``, e.g. the command.
        listener: told of progress, on rank 0.
        report: called on every rank with each epoch's row; what it raises ends the training.
        ask: called on every rank behind each step and epoch; tells whether to save or stop there.
        test: measure the best epoch's weights on the test images, which trials leave alone.

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
        raise UserError("--use-gpu: torch finds no GPU here; leave it out to train on the CPU")
    set_seed(config.seed + rank, config.deterministic, config.tf32)
    network = resnet18(len(dataset.classes), config.stem, config.weights)
    if config.sync_batchnorm:
        synchronize(network)
    if config.channels_last:
        network = network.to(memory_format=torch.channels_last)
    images = ImageDataModule(config, dataset)
    steps_per_epoch = dataset.steps_per_epoch(config.batch_size)
    module = Classifier(network, config, steps_per_epoch)
    if config.compile:
        for each in {module.network, module.evaluated}:
            # The epoch's last batch may be smaller. By default torch would then compile a graph for
            # any size, which would serve all later batches, only slower.
            each.compile(dynamic=False)
    identity = {**config.computes(), "dataset_fingerprint": dataset.fingerprint}
    writer = BackgroundWriter()
    record = Record(
        run, config, identity, _also_tell(listener, report) if rank == 0 else report, writer, ask
    )
    skips = SkipNonFinite(listener if rank == 0 else ignore, config.on_nonfinite == "skip")
    callbacks: list[pl.Callback] = [skips, record]
    if config.on_nonfinite == "stop":
        callbacks.append(StopOnNonFinite(run, writer))
    if config.ema:  # after what undoes a step's statistics
        callbacks.append(AverageWeights(config.ema))
    if strategy != "auto" and not config.sync_batchnorm:  # else they are the same on all ranks
        callbacks.append(AverageBatchNorm())
    if rank == 0:
        callbacks.append(StepEvents(listener))
        run.write_environment(
            {
                **environment(),
                "dataset_fingerprint": dataset.fingerprint,
                # So that the model can be used where its data set is not.
                "dataset": dataset.about._asdict(),
                **(launched or {}),
            }
        )
    checkpoints = Checkpoints()
    # Lightning calls every callback at six places in a step, so none is there that has no use.
    trainer = pl.Trainer(
        max_epochs=config.max_epochs,
        accelerator="gpu" if config.use_gpu else "cpu",
        devices=1 if strategy == "auto" else "auto",
        strategy=strategy,
        plugins=[*plugins, checkpoints],
        precision=config.precision,
        callbacks=callbacks,
        use_distributed_sampler=False,  # the data module shards, and counts each image once
        num_sanity_val_steps=0,
        logger=(make_logger(config, run) if rank == 0 else None) or False,
        enable_progress_bar=False,
        enable_model_summary=False,
        profiler=NoProfiler(),
    )
    if not skips.active(trainer):
        trainer.callbacks.remove(skips)  # type: ignore[attr-defined]
    # Lightning would end the run on SIGTERM by itself, at an epoch's end and with exit 0. Signals
    # are the business of whoever called this.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    # So nobody has a signal to tell the other ranks of, for which Lightning 2.6 would make a GPU
    # finish every step before the next is prepared.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    checkpoint = _agreed(
        rank, lambda: checkpoints.find_checkpoint(run, identity, module.state_dict(), listener)
    )
    found = None if checkpoint is None else str(checkpoint)
    if rank == 0:
        listener({"kind": "start", "world_size": trainer.world_size, "checkpoint": found})
    undetermined = functools.partial(
        nondeterminism_reported, listener if rank == 0 else ignore, set()
    )
    with freed_memory_kept(), writer, undetermined():
        trainer.fit(module, images, ckpt_path=found, weights_only=True)

    weights_sha256 = hashlib.sha256(weights_as_bytes(module.evaluated)).hexdigest()
    tested: dict[str, Any] = {"accuracy": None, "loss": None, "images": 0}
    if test:
        module.evaluated.load_state_dict(load(run.model_file.read_bytes()))
        kept = KeepPredictions(run, dataset, record.best_epoch)
        trainer.callbacks.append(kept)  # type: ignore[attr-defined]
        with undetermined():
            trainer.test(module, images, verbose=False)
        tested = module.tested
    return Outcome(
        history=record.history,
        best_epoch=record.best_epoch,
        test_accuracy=tested["accuracy"],
        test_loss=tested["loss"],
        test_images=int(tested["images"]),
        weights_sha256=weights_sha256,
        skipped_updates=skips.skipped,
    )


def _agreed(rank: int, find: Callable[[], AnyPath | None]) -> AnyPath | None:
    """What rank 0 finds, on every rank; what it raises, rank 0 raises."""
    found = [find() if rank == 0 else None]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found)
    return found[0]


def _also_tell(
    listener: Listener, report: Callable[[dict[str, Any]], None]
) -> Callable[[dict[str, Any]], None]:
    def tell(row: dict[str, Any]) -> None:
        listener({"kind": "epoch", **row})
        report(row)

    return tell


def _silence_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", module="torchmetrics")
    warnings.filterwarnings("ignore", module="torch")
