"""Runs of seconds, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifar_dist.config.train import TrainConfig
from cifar_dist.train import Trained, train
from tests.training.small import TrainFew


@pytest.fixture(scope="module")
def train_few(few_digits: Path) -> TrainFew:
    def train_few(folder: Path, name: str, listener=lambda event: None, **settings) -> Trained:
        config = {
            "data_dir": str(few_digits), "num_workers": 0, "batch_size": 24, "max_epochs": 3,
            "flip": 0.0, "report": False, "storage_path": str(folder), "name": name, **settings,
        }  # fmt: skip
        return train(TrainConfig(**config), listener)

    return train_few
