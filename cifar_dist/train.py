"""``python -m cifar_dist.train``: train an image classifier with DDP workers under Ray."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cifar_dist import __version__
from cifar_dist.cli import parse_train
from cifar_dist.config.checks import check_image_side
from cifar_dist.config.train import TrainConfig, with_absolute_paths
from cifar_dist.errors import Diverged, Interrupted, RunFailed, UserError
from cifar_dist.events import Event, Listener, Order, Plan, RestartCounter, Started, ignore
from cifar_dist.exits import run_command
from cifar_dist.model.networks import check_network, check_starting_weights
from cifar_dist.registry import SCHEDULES, dataset_traits
from cifar_dist.reports.attempt import leave_report
from cifar_dist.runs.commit import git_commit
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.runs.lock import Lock, locked
from cifar_dist.runs.metrics import Outcome
from cifar_dist.signals import interruption_noted
from cifar_dist.terminal.hints import files_in, resume_command, shown
from cifar_dist.terminal.run import Display, duration

COMMAND = "python -m cifar_dist.train"
EVALUATE = ("python", "-m", "cifar_dist.evaluate")


@dataclass(frozen=True)
class Trained:
    """The result of `train`."""

    run: RunDirectory
    outcome: Outcome
    summary: dict[str, Any]
    """The content of ``summary.json``."""


def train(config: TrainConfig, listener: Listener = ignore, command: str | None = None) -> Trained:
    """Train, test once, and leave a run directory.

    Args:
        config: the run. With ``num_workers=0`` it is trained in this process without Ray.
        listener: notified of progress, in this thread; see `cifar_dist.events`.
        command: what was typed, for ``environment.json``.

    Raises:
        UserError: bad configuration or data, too few resources, or another command works in the
            run's directory; a new run leaves nothing.
        RunFailed: the run failed after its restarts. Other exceptions come from ``listener`` or a
            library, e.g. of a run without Ray; a note says how to resume what was trained.
        Interrupted: the process was asked to stop; what is needed to resume is saved.
    """
    config = with_absolute_paths(config)
    run = RunDirectory.existing(config) if config.resume else RunDirectory.create(config)
    with locked(run.path, listener) as lock:
        return _train(config, run, lock, listener, command)


def _train(
    config: TrainConfig, run: RunDirectory, lock: Lock, listener: Listener, command: str | None
) -> Trained:
    """Train in a directory that no other command writes into; see `train`."""
    began = time.monotonic()

    def heard(event: Event) -> None:
        if isinstance(event, Started):
            # What the last command has summarised holds no longer, and would stay if this one
            # were killed.
            with contextlib.suppress(OSError):
                run.summary_file.unlink(missing_ok=True)
        listener(event)

    counter = RestartCounter(heard)

    def summarise(status: str, outcome: Outcome | None = None) -> dict[str, Any]:
        seconds = time.monotonic() - began
        return run.write_summary(config.dataset, status, outcome, counter.restarts, seconds)

    to_resume = f"to resume: {resume_command(COMMAND, run.name, config.storage_path)}"
    try:
        outcome = _run(config, run, counter, {"command": command, "git_commit": git_commit()})
    except UserError:
        # A refused resume changes nothing on disk.
        if not config.resume:
            run.discard()
        raise
    except (Interrupted, KeyboardInterrupt) as stop:
        # Both errors, since in a notebook no handler of ours turns Ctrl-C into `Interrupted`.
        lock.check()
        with contextlib.suppress(Exception):  # must not hide how to resume
            summarise("interrupted")
        said = f"interrupted: {stop}" if str(stop) else "interrupted"
        raise Interrupted(f"{said}; {to_resume}") from None
    except RunFailed as error:
        with contextlib.suppress(Exception):  # e.g. no room for that either
            summarise("failed")
            if config.report:
                leave_report(run, listener)
        if isinstance(error, Diverged):  # resumed as it is, it would end there again
            to_resume += " --on-nonfinite skip"
        # Of the same type, by which callers distinguish a run that diverged.
        raise type(error)(f"{error}\n{to_resume}") from error
    except Exception as error:  # which no code expects, e.g. a library's
        if config.resume or not run.discard():
            error.add_note(to_resume)
            with contextlib.suppress(Exception):
                summarise("failed")
        raise
    lock.check()
    trained = Trained(run, outcome, summarise("completed", outcome))
    if config.report:
        leave_report(run, listener)
    return trained


def _run(
    config: TrainConfig, run: RunDirectory, listener: RestartCounter, launched: dict[str, Any]
) -> Outcome:
    """Check what can be checked here, then train here or on a cluster."""
    from cifar_dist.data.cache import CachedDataset, prepare
    from cifar_dist.data.datasets import find_source

    # Network and data are checked before Ray starts, which takes seconds and would delay a refusal.
    check_network(config)
    run.check_checkpoints()
    source = find_source(config.dataset, str(config.data_dir))
    check_image_side(config, source.image_side())

    def begin(where: str) -> CachedDataset:
        started_with = run.started_with_fingerprint()
        dataset = prepare(config.dataset, source, started_with, listener)
        dataset.check_batches(config.batch_size, max(config.max_workers, 1))
        if started_with not in (None, dataset.fingerprint):
            raise UserError(
                f"--data-dir {config.data_dir}: holds other data than the run was started with; "
                "name the folder that it was started with"
            )
        run.write_config(config)  # a resumed run's only now, when nothing refuses it any more
        listener(_plan(config, run, dataset, where))
        return dataset

    if config.max_workers == 0:
        check_starting_weights(config, listener)
        from cifar_dist.training.fit import fit

        dataset = begin("this process, without Ray")

        def ask(step: int) -> Order:
            return Order.STOP if interrupted() else Order.CONTINUE

        with interruption_noted(listener) as interrupted:
            return fit(config, run, dataset, launched=launched, listener=listener, ask=ask)

    from cifar_dist.cluster.resources import have_resources
    from cifar_dist.cluster.session import check_shared, session

    loading = ThreadPoolExecutor(1)
    if not config.use_gpu:  # GPUs that are not there are refused seconds earlier without torch
        # Submitted before Ray starts, which mostly waits.
        loaded = loading.submit(_load_trainer, config)
    with session(config.verbose) as where:
        have_resources(config, listener)
        check_shared(run.path)
        if config.use_gpu:
            loaded = loading.submit(_load_trainer, config)
        for warned in loaded.result():
            listener(warned)
        from cifar_dist.cluster.trainer import train_on_ray

        dataset = begin(where)
        outcome = train_on_ray(config, run, dataset.fingerprint, launched, listener)
        assert outcome is not None  # only trials are stopped
        return outcome


def _load_trainer(config: TrainConfig) -> list[Event]:
    """Load torch and what trains on Ray, and refuse starting weights of another network.

    Weights from a file load torchvision too; without any, only workers do.

    Returns:
        What there is to say of the weights: not said here, in a thread of its own.
    """
    events: list[Event] = []
    check_starting_weights(config, events.append)
    import cifar_dist.cluster.trainer  # noqa: F401

    return events


def _plan(config: TrainConfig, run: RunDirectory, dataset: Any, where: str) -> Plan:
    steps = dataset.steps_per_epoch(config.batch_size)
    device = "GPU" if config.use_gpu else "CPU"
    each = config.gpus_per_worker if config.use_gpu else config.cpus_per_worker
    on_gpu = f", {_arithmetic(config)}" if config.use_gpu else ""
    workers = f"{config.num_workers} workers x {each:g} {device} on " if config.max_workers else ""
    return Plan(
        config.max_epochs,
        steps,
        lines=[
            f"cifar_dist {__version__}: {config.network} on {config.dataset} "
            f"({dataset.train_images:,} training, {dataset.validation_images:,} validation, "
            f"{dataset.test_images:,} test images)",
            f"{workers}{where}; {config.max_epochs} epochs x {steps} steps, "
            f"batch size {config.batch_size}, {config.optimizer}, lr {config.lr:g}{on_gpu}",
            f"run {shown(run.path)}",
        ],
    )


def _arithmetic(config: TrainConfig) -> str:
    """Return the arithmetic of a GPU's convolutions."""
    if config.precision == "32":
        return "TF32" if config.tf32 else "float32"
    return {"bf16-mixed": "bf16", "16-mixed": "fp16"}[config.precision]


def _results(trained: Trained, config: TrainConfig) -> list[str]:
    summary = trained.summary
    more = str(config.max_epochs * 2)
    return [
        f"test accuracy {summary['test_accuracy']:.4f}, loss {summary['test_loss']:.4f} over "
        f"{trained.outcome.test_images:,} images, weights of epoch {summary['best_epoch']} "
        f"(val_accuracy {summary['val_accuracy']:.4f})",
        f"done in {duration(summary['seconds'])}, {summary['restarts']} restarts",
        f"files in {shown(trained.run.path)}: {files_in(trained.run.path)}",
        _next_run(config, trained.run, more),
        f"next: {shlex.join([*EVALUATE, str(shown(trained.run.path))])}",
    ]


def _next_run(config: TrainConfig, run: RunDirectory, more: str) -> str:
    """Return a further run that suits this one, and what it does."""
    # Data that come with a package are for trying things out: suggest the default data set.
    if not dataset_traits(config.dataset).needs_folder:
        title = dataset_traits(TrainConfig.dataset).title
        return f"to train on {title}: {COMMAND} --num-workers {config.num_workers} --max-epochs 3"
    if not SCHEDULES.about(config.schedule).needs_horizon:
        longer = resume_command(COMMAND, run.name, config.storage_path, "--max-epochs", more)
        return f"to train longer: {longer}"
    again = f"--config {shown(run.config_file)} --seed {config.seed + 1}"
    return f"to repeat with another seed: {COMMAND} {again}"


def main(words: list[str]) -> None:
    """Parse, train, and print the results."""
    config = parse_train(words)
    display = Display(sys.stdout)
    try:
        trained = train(config, display, command=shlex.join([*COMMAND.split(), *words]))
    finally:
        # Else the error or the result would be written into the live line.
        display.close()
    for line in _results(trained, config):
        display.line(line)


if __name__ == "__main__":
    run_command(main)
