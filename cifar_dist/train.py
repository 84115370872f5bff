"""``python -m cifar_dist.train``: train ResNet-18 on CIFAR-10 with DDP workers under Ray."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_dist import __version__
from cifar_dist.cli import parse_train, run_command
from cifar_dist.cluster.progress import Display, duration
from cifar_dist.config import TrainConfig
from cifar_dist.errors import Interrupted, RunFailed, UserError
from cifar_dist.events import Event, Listener, ignore
from cifar_dist.runs import Outcome, RunDirectory

COMMAND = "python -m cifar_dist.train"


@dataclass(frozen=True)
class Trained:
    """What `train` returns."""

    run: RunDirectory
    outcome: Outcome
    summary: dict[str, Any]
    """What ``summary.json`` holds."""


def train(config: TrainConfig, listener: Listener = ignore, command: str | None = None) -> Trained:
    """Train, test once, and leave a run directory.

    Args:
        config: the run. With ``num_workers=0`` it is trained in this process without Ray.
        listener: told of progress, in this thread; see `cifar_dist.events`.
        command: what was typed, for ``environment.json``.

    Raises:
        UserError: bad configuration or data, or too few resources; a new run leaves nothing.
        RunFailed: the run failed after its restarts.
        Interrupted: the process was asked to stop; what is needed to go on is saved.
    """
    began = time.monotonic()
    starts = 0

    def count(event: Event) -> None:
        nonlocal starts
        starts += event["kind"] == "start"
        listener(event)

    def summarise(status: str, outcome: Outcome | None = None) -> dict[str, Any]:
        seconds = time.monotonic() - began
        return run.write_summary(config.dataset, status, outcome, max(starts - 1, 0), seconds)

    config = _with_absolute_paths(config)
    run = RunDirectory.existing(config) if config.resume else RunDirectory.create(config)
    if not config.resume:
        run.write_config(config)
    go_on = f"to go on: {resume_command(config, run)}"
    try:
        outcome = _run(config, run, count, {"command": command, "git_commit": _git_commit()})
    except UserError:
        if not config.resume:
            run.discard()
        raise
    except (Interrupted, KeyboardInterrupt):
        summarise("interrupted")
        raise Interrupted(f"interrupted; {go_on}") from None
    except RunFailed as error:
        summarise("failed")
        raise RunFailed(f"{error}\n{go_on}") from error
    return Trained(run, outcome, summarise("completed", outcome))


def _run(
    config: TrainConfig, run: RunDirectory, listener: Listener, launched: dict[str, Any]
) -> Outcome:
    """Check what can be checked here, then train here or on a cluster."""
    from cifar_dist.data.cache import CachedDataset, prepare
    from cifar_dist.data.sources import find_source

    _check_weights(config)
    source = find_source(config.dataset, str(config.data_dir))

    def begin(where: str) -> CachedDataset:
        dataset = prepare(config.dataset, source)
        dataset.check_batches(config.batch_size, max(config.max_workers, 1))
        if run.started_with_fingerprint() not in (None, dataset.fingerprint):
            raise UserError(
                f"--data-dir {config.data_dir}: holds other data than the run was started with; "
                "name the folder that it was started with"
            )
        run.write_config(config)  # a resumed run's only now, when nothing refuses it any more
        listener(_plan(config, run, dataset, where))
        return dataset

    if config.max_workers == 0:
        from cifar_dist.training.fit import fit

        dataset = begin("this process, without Ray")
        try:
            return fit(config, run, dataset, launched=launched, listener=listener)
        except (UserError, Interrupted):
            raise
        except Exception:
            raise RunFailed(traceback.format_exc().strip()) from None

    from cifar_dist.cluster.session import check_resources, session

    with session(config.verbose) as where:
        check_resources(config)
        # Behind the check, since it loads torch: what is refused is refused seconds earlier.
        from cifar_dist.cluster.trainer import train_on_ray

        dataset = begin(where)
        return train_on_ray(config, run, dataset.fingerprint, launched, listener)


def _check_weights(config: TrainConfig) -> None:
    """See that the starting weights can be had, before workers are asked for."""
    from cifar_dist.model.resnet import check_weights_file, imagenet_file, imagenet_weights

    if config.weights == "imagenet":
        if not imagenet_file().exists():
            imagenet_weights()
    elif config.weights != "none":
        check_weights_file(config.weights, config.stem)


def _plan(config: TrainConfig, run: RunDirectory, dataset: Any, where: str) -> Event:
    steps = dataset.steps_per_epoch(config.batch_size)
    device = "GPU" if config.use_gpu else "CPU"
    each = config.gpus_per_worker if config.use_gpu else config.cpus_per_worker
    workers = f"{config.num_workers} workers x {each:g} {device} on " if config.max_workers else ""
    return {
        "kind": "plan",
        "max_epochs": config.max_epochs,
        "steps_per_epoch": steps,
        "lines": [
            f"cifar_dist {__version__}: ResNet-18 on {config.dataset} "
            f"({dataset.train_images:,} training, {dataset.validation_images:,} validation, "
            f"{dataset.test_images:,} test images)",
            f"{workers}{where}; {config.max_epochs} epochs x {steps} steps, "
            f"batch size {config.batch_size}, {config.optimizer}, lr {config.lr:g}",
            f"run {_shown(run.path)}",
        ],
    }


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Workers run in other directories, and ``config.yaml`` is read in others."""
    weights = config.weights
    if weights not in ("none", "imagenet"):
        weights = str(Path(weights).expanduser().absolute())
    data_dir = str(Path(str(config.data_dir)).expanduser().absolute())
    return dataclasses.replace(config, data_dir=data_dir, weights=weights)


def resume_command(config: TrainConfig, run: RunDirectory, *flags: str) -> str:
    """What to type to go on with a run."""
    words = [*COMMAND.split(), "--name", run.name, "--resume"]
    if config.storage_path != TrainConfig().storage_path:
        words += ["--storage-path", config.storage_path]
    return shlex.join([*words, *flags])


def _git_commit() -> str | None:
    """The commit of the checkout that this package is imported from, if it is one."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return None
    asked = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _results(trained: Trained, config: TrainConfig) -> list[str]:
    summary = trained.summary
    more = str(config.max_epochs * 2)
    files = sorted(f"{p.name}/" if p.is_dir() else p.name for p in trained.run.path.iterdir())
    return [
        f"test accuracy {summary['test_accuracy']:.4f}, loss {summary['test_loss']:.4f} over "
        f"{trained.outcome.test_images:,} images, weights of epoch {summary['best_epoch']} "
        f"(val_accuracy {summary['val_accuracy']:.4f})",
        f"done in {duration(summary['seconds'])}, {summary['restarts']} restarts",
        f"files in {_shown(trained.run.path)}: {' '.join(files)}",
        f"next: {_next_command(config, trained.run, more)}",
    ]


def _shown(path: Path) -> Path:
    """A path as a person standing here would write it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _next_command(config: TrainConfig, run: RunDirectory, more: str) -> str:
    if config.dataset == "digits":
        return f"{COMMAND} --num-workers {config.num_workers} --max-epochs 3"
    if config.schedule == "steplr":
        return resume_command(config, run, "--max-epochs", more)
    return f"{COMMAND} --config {_shown(run.config_file)} --seed {config.seed + 1}"


def main(words: list[str]) -> None:
    """Parse, train, and print what came of it."""
    config = parse_train(words)
    display = Display(sys.stdout)
    try:
        trained = train(config, display, command=shlex.join([*COMMAND.split(), *words]))
    finally:
        display.close()
    for line in _results(trained, config):
        display.line(line)


if __name__ == "__main__":
    run_command(main)
