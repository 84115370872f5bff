"""Lightning's loggers for trackers that people use."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import UserError
from cifar_dist.runs.directory import RunDirectory

PROJECT = "cifar_dist"


def make_logger(config: TrainConfig, run: RunDirectory) -> Logger | None:
    """The logger that a run's settings ask for; what it writes to a disk is in the run's directory.

    A run that goes on goes on in the tracker too.

    Raises:
        UserError: the tracker's package is missing, or it cannot write where the run is.
    """
    if config.logger == "none":
        return None
    here = isinstance(run.path, Path)
    folder = str(run.path) if here else tempfile.gettempdir()
    try:
        if config.logger == "tensorboard":
            if not here:
                raise UserError(
                    f"--logger tensorboard: cannot write to {run.path}; use a folder, or wandb or "
                    "mlflow with a server"
                )
            return TensorBoardLogger(save_dir=folder, name="", version="tensorboard")
        if config.logger == "wandb":
            return WandbLogger(
                project=PROJECT, name=run.name, id=run.name, resume="allow", save_dir=folder
            )
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder}/mlflow.db"
        return MLFlowLogger(experiment_name=PROJECT, run_name=run.name, tracking_uri=uri)
    except ModuleNotFoundError:
        raise UserError(
            f"--logger {config.logger}: is not installed where workers run; pip install "
            f"'cifar-dist[{config.logger}]'"
        ) from None
