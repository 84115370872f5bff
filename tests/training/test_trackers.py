"""What trackers are told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cifar_dist.errors import UserError
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.storage import at
from cifar_dist.training.trackers import make_logger
from tests.training.small import TrainFew


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    return [(event.step, event.value) for event in read.Scalars(name)]


def test_tensorboard_has_the_rows_of_metrics_csv(train_few: TrainFew, tmp_path: Path) -> None:
    plain = train_few(tmp_path, "plain", max_epochs=3)
    told = train_few(tmp_path, "told", max_epochs=2, logger="tensorboard")
    told = train_few(tmp_path, "told", max_epochs=3, logger="tensorboard", resume=True)
    rows = told.run.read_metrics()
    for name in ("train_loss", "val_accuracy", "lr"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
        assert scalars(told.run.path, name) == expected
    assert told.summary["weights_sha256"] == plain.summary["weights_sha256"]


def test_what_cannot_be_told_is_refused(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_few(tmp_path, "run", max_epochs=1).run.read_config()
    with pytest.raises(UserError, match="--logger tensorboard: cannot write to s3://"):
        make_logger(_with(config, "tensorboard"), RunDirectory(at("s3://bucket/run")))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--logger wandb: .*pip install 'cifar-dist\[wandb\]'"):
        make_logger(_with(config, "wandb"), RunDirectory(tmp_path))


def _with(config, logger):
    return config.replace(logger=logger)
