"""Lightning's loggers for experiment trackers, by the names that `cifar_dist.registry` gives them.

A logger is a function of the run's directory. What it writes to a disk belongs in that directory,
and a resumed run continues in the tracker too.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from cifar_dist.errors import UserError
from cifar_dist.registry import LOGGERS
from cifar_dist.runs.directory import RunDirectory

PROJECT = "cifar_dist"


def make_logger(name: str, run: RunDirectory) -> Logger | None:
    """Return the logger of that name for a run; None for ``none``.

    Raises:
        UserError: the tracker's package is missing, or it cannot write to the run's directory.
    """
    if name == "none":
        return None
    try:
        # Lightning's loggers raise for a missing package when they are made, not when imported.
        logger: Logger = LOGGERS[name](run)
    except ModuleNotFoundError:
        raise UserError(
            f"--logger {name}: is not installed where workers run; pip install 'cifar-dist[{name}]'"
        ) from None
    return logger


def tensorboard(run: RunDirectory) -> Logger:
    """Return a logger that writes TensorBoard's files.

    Raises:
        UserError: the run is in an object store, which TensorBoard cannot write to.
    """
    if not isinstance(run.path, Path):
        raise UserError(
            f"--logger tensorboard: cannot write to {run.path}; use a folder, or wandb or mlflow "
            "with a server"
        )
    # A fixed version: by default each resume would begin another folder.
    return TensorBoardLogger(save_dir=str(run.path), name="", version="tensorboard")


def wandb(run: RunDirectory) -> Logger:
    """Return a logger for Weights & Biases."""
    # The name is the id and ``allow`` continues one that exists, so a resumed run stays one run.
    return WandbLogger(
        project=PROJECT, name=run.name, id=run.name, resume="allow", save_dir=_folder(run)
    )


def mlflow(run: RunDirectory) -> Logger:
    """Return a logger for MLflow: its server where the environment names one, else a database."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_folder(run)}/mlflow.db"
    return MLFlowLogger(experiment_name=PROJECT, run_name=run.name, tracking_uri=uri)


def _folder(run: RunDirectory) -> str:
    """Return the run's directory, or where a run in an object store may write for a while."""
    return str(run.path) if isinstance(run.path, Path) else tempfile.gettempdir()
