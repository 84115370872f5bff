"""The model that a command names: its run, its weights, and the settings of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cifar_dist.config.fields import flag
from cifar_dist.config.model import ModelConfig
from cifar_dist.config.train import TrainConfig, make_config
from cifar_dist.errors import UserError
from cifar_dist.events import Listener, Warned, ignore
from cifar_dist.model.weights import in_folder
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.storage import AnyPath, at

WEIGHTS = (".safetensors", ".pth", ".pt", ".pth.tar", ".bin", ".ckpt")
NO_HALF_ON_CPU = "the run was trained in 16-mixed, which needs a GPU; computing in float32"


_OF_THE_NETWORK = ("dataset", "network", "stem", "image_size")


def run_of(config: ModelConfig) -> RunDirectory | None:
    """Return the run whose weights they are; None for a file of weights of its own."""
    folder = at(config.model)
    # Weights of a run that are named by their file still have the run's settings beside them: the
    # best epoch's, exported ones, and checkpoints. Others may lie in a folder of other settings.
    if folder.name.startswith("model."):
        folder = folder.parent
    elif folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    found = RunDirectory(folder)
    return found if found.config_file.is_file() else None


def weights_file(config: ModelConfig) -> AnyPath:
    """Return the file with the weights.

    Raises:
        UserError: there is none.
    """
    run, file = run_of(config), at(config.model)
    if run and run.path == file:
        file = run.model_file
        if file.is_file():
            return file
        run.read_config()  # refuses what is no run's, e.g. a search's
        raise UserError(f"{config.model}: the run has not done an epoch yet; train it first")
    if file.is_dir() and (found := in_folder(file)) is not None:
        return found
    if file.is_file() and file.name.endswith(WEIGHTS):
        return file
    wanted = f"give a run's directory, e.g. runs/first, or weights ({', '.join(WEIGHTS)})"
    problem = "is neither a run nor weights" if file.exists() else "there is no such file"
    raise UserError(f"{config.model}: {problem}; {wanted}")


def trained_config(config: ModelConfig, listener: Listener = ignore, **here: Any) -> TrainConfig:
    """Return the settings that the weights were trained with, as far as using them needs them.

    Args:
        config: names the model.
        listener: notified where float32 stands in for a precision that needs a GPU.
        here: how they are used, by setting: workers, GPU, precision; None for the run's.

    Raises:
        UserError: the run's settings cannot be read, or contradict these.
    """
    given = {name: getattr(config, name) for name in ("data_dir", *_OF_THE_NETWORK)}
    given = {k: v for k, v in {**here, **given}.items() if v is not None}
    given["gpus_per_worker"] = None  # follows from use_gpu
    least = 2 * int(given.get("num_workers", 0))  # images of a batch, which is not used
    if (run := run_of(config)) is None:
        return make_config({**given, "batch_size": max(TrainConfig.batch_size, least)})
    trained = run.read_config()
    for name in _OF_THE_NETWORK:
        if given.get(name, before := getattr(trained, name)) != before:
            raise UserError(
                f"{flag(name)} {given[name]}: the run was trained with {before}; omit {flag(name)}"
            )
    if not Path(str(trained.data_dir)).exists():  # trained on another machine
        given.setdefault("data_dir", TrainConfig().data_dir)
    on_gpu = given.get("use_gpu", trained.use_gpu)
    if trained.precision == "16-mixed" and not on_gpu and "precision" not in given:
        given["precision"] = "32"
        listener(Warned(NO_HALF_ON_CPU))
    given["batch_size"] = max(trained.batch_size, least)
    return trained.replace(**given)
