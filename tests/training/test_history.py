"""Rows of metrics: their columns, and what the clock of an epoch counts."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cifar_dist.config.train import TrainConfig
from cifar_dist.registry import COLUMNS
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.runs.metrics import METRICS, TIMING_METRICS, WHOLE_METRICS
from cifar_dist.training.columns import EpochEnd
from cifar_dist.training.history import MetricsHistory
from tests.registering import register
from tests.training.small import Small, TrainFew, small_network


def test_the_columns_are_what_they_were() -> None:
    # Files that exist have these, in this order.
    assert METRICS[:11] == (
        "epoch", "step", "samples", "world_size", "lr", "train_loss", "train_accuracy",
        "val_loss", "val_accuracy", "images_per_second", "seconds",
    )  # fmt: skip
    assert {"epoch", "step", "samples", "world_size"} <= WHOLE_METRICS
    assert TIMING_METRICS == ("images_per_second", "seconds")


def gap(end: EpochEnd) -> float:
    return end.train["accuracy"] - end.val["accuracy"]


def test_a_registered_column_is_written_and_empty_where_it_did_not_exist(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_network(Small):
        train_few(tmp_path, "run", max_epochs=1)
        register(monkeypatch, COLUMNS, "gap", gap)
        trained = train_few(tmp_path, "run", max_epochs=3, resume=True)
    rows = list(csv.DictReader(trained.run.metrics_file.read_text().splitlines()))
    assert list(rows[0]) == [*METRICS, "gap"]
    assert rows[0]["gap"] == ""
    for row in rows[1:]:
        assert float(row["gap"]) == float(row["train_accuracy"]) - float(row["val_accuracy"])


def test_the_clock_is_read_once_the_gpu_has_done_the_last_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The nearest that a machine without a GPU comes to steps that are still queued.
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(0.05))
    run = RunDirectory.at(str(tmp_path), "run")
    clock = MetricsHistory(run, TrainConfig(), lambda row: None)
    began = time.perf_counter()
    module: Any = SimpleNamespace(device=torch.device("cuda"))
    clock.on_validation_start(SimpleNamespace(), module)
    assert clock._trained - began >= 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_a_second_count_what_the_gpu_has_yet_to_do(
    train_few: TrainFew, tmp_path: Path
) -> None:
    class Slow(Small):
        def disturbed(self, hidden: Tensor) -> Tensor:
            if self.training:
                torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s of a GPU, queued in no time
            return hidden

    with small_network(Slow):
        trained = train_few(tmp_path, "slow", use_gpu=True, max_epochs=2)
    last = trained.outcome.history[-1]
    assert 144 / last["images_per_second"] > 6 * 0.05
