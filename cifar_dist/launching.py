"""What commands do before and after the work itself."""

from __future__ import annotations

import dataclasses
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.config import TrainConfig
from cifar_dist.errors import Interrupted, first_line
from cifar_dist.events import INTERRUPTED, Listener, ignore
from cifar_dist.model_config import ModelConfig
from cifar_dist.runs import Directory
from cifar_dist.storage import AnyPath, at

if TYPE_CHECKING:
    from cifar_dist.data.cache import TrainedOn
    from cifar_dist.model.trained import TrainedModel


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Workers run in other directories, and ``config.yaml`` is read in others."""
    weights = config.weights
    if weights not in ("none", "imagenet"):
        weights = str(at(weights))
    data_dir = str(Path(str(config.data_dir)).expanduser().absolute())
    return dataclasses.replace(config, data_dir=data_dir, weights=weights)


def check_weights(config: TrainConfig) -> None:
    """See that the starting weights can be had, before workers are asked for.

    Raises:
        UserError: they cannot.
    """
    from cifar_dist.model.resnet import check_weights_file, imagenet_file, imagenet_weights

    if config.weights == "imagenet":
        if not imagenet_file().exists():
            imagenet_weights()
    elif config.weights != "none":
        check_weights_file(config.weights, config.stem)


def model_of(
    config: ModelConfig, listener: Listener = ignore, **here: Any
) -> tuple[TrainedModel, TrainedOn]:
    """The model that a config names, on this process's device, and what it was trained on.

    Args:
        config: names the model.
        listener: notified of a precision that needs a GPU.
        here: how it is used, by setting of `TrainConfig`.

    Raises:
        UserError: no such model, bad weights, or, where a run does not say itself what it was
            trained on, no such data.
    """
    from cifar_dist.data.cache import TrainedOn, prepare
    from cifar_dist.data.sources import find_source
    from cifar_dist.model.resnet import read_weights
    from cifar_dist.model.trained import load_trained
    from cifar_dist.training.seeding import set_seed

    file = str(config.weights_file)
    trained = with_absolute_paths(config.trained(listener, num_workers=0, **here))
    saved = config.run and config.run.trained_on()
    if saved:
        lists = {name: tuple(saved[name]) for name in ("classes", "mean", "std")}
        about = TrainedOn(name=saved["name"], **lists)
    else:
        source = find_source(trained.dataset, str(trained.data_dir))
        about = prepare(trained.dataset, source).about
    set_seed(trained.seed, trained.deterministic, trained.tf32)
    return load_trained(file, read_weights(file), trained, about), about


def git_commit() -> str | None:
    """The commit of the checkout that this package is imported from, if it is one."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return None
    asked = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def resume_command(command: str, name: str, storage_path: str, *flags: str) -> str:
    """What to type to go on with a run or a search."""
    words = [*command.split(), "--name", name, "--resume"]
    if storage_path != TrainConfig.storage_path:
        words += ["--storage-path", storage_path]
    return shlex.join([*words, *flags])


def shown(path: AnyPath) -> AnyPath:
    """A path as a person standing here would write it."""
    if isinstance(path, Path) and path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd())
    return path


def files_in(folder: AnyPath) -> str:
    """The names in a folder, for a line of output."""
    return " ".join(sorted(f"{p.name}/" if p.is_dir() else p.name for p in folder.iterdir()))


def leave_report(directory: Directory, listener: Listener) -> None:
    """Draw a run's or a search's ``report.html``; what goes wrong there is only told.

    Args:
        directory: of what has ended.
        listener: told in one line why there is none.
    """
    try:
        from cifar_dist.reports.write import write_report

        # The workers have kept what it takes: nothing is computed here, and no torch loaded.
        write_report([directory.path], measure=False)
    except Exception as error:
        listener({"kind": "warning", "message": f"no report.html: {first_line(error)}"})


@contextmanager
def interruption_noted(listener: Listener) -> Iterator[Callable[[], bool]]:
    """While this lasts, the first SIGINT or SIGTERM is only noted; the second is `Interrupted`.

    Args:
        listener: told of the first.

    Yields:
        A function that says whether there was one.
    """
    noted = False

    def note(signum: int, frame: object) -> None:
        nonlocal noted
        if noted:
            raise Interrupted
        noted = True
        listener(INTERRUPTED)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: noted
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
