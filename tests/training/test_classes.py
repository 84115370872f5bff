"""A run on a data set that is not ten classes of 32x32 pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.cache import prepare
from cifar_dist.data.datasets.parquet import find_parquet
from cifar_dist.inference.predictions import Predictions
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.training.fit import fit
from tests.conftest import write_parquet


def test_a_run_keeps_300_classes_apart_to_its_predictions(tmp_path: Path) -> None:
    labels = np.arange(300)
    for seed, split in enumerate(("train", "test")):
        images = np.random.default_rng(seed).integers(0, 256, (300, 8, 8, 3), np.uint8)
        write_parquet(tmp_path / f"{split}.parquet", images, labels)
    dataset = prepare("many", find_parquet(tmp_path))
    config = TrainConfig(
        num_workers=0, batch_size=135, max_epochs=1, storage_path=str(tmp_path), name="run"
    )
    run = RunDirectory.create(config)
    outcome = fit(config, run, dataset)
    assert outcome.test_images == 300
    kept = Predictions.from_bytes(run.predictions_file.read_bytes())
    assert kept.logits.shape == (300, 300)
    assert kept.labels.tolist() == labels.tolist()
    assert kept.pictures.shape[1:] == (3, 8, 8)
    about = json.loads(run.environment_file.read_text())["dataset"]
    assert (len(about["classes"]), about["side"]) == (300, 8)
