"""What trackers are given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

import pytest
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cifar_dist.errors import UserError
from cifar_dist.registry import LOGGERS
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.storage import at
from cifar_dist.training.trackers import make_logger
from tests.registering import register
from tests.training.small import TrainFew


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    return [(event.step, event.value) for event in read.Scalars(name)]


def test_tensorboard_has_the_rows_of_metrics_csv(train_few: TrainFew, tmp_path: Path) -> None:
    plain = train_few(tmp_path, "plain", max_epochs=3)
    tracked = train_few(tmp_path, "tracked", max_epochs=2, logger="tensorboard")
    tracked = train_few(tmp_path, "tracked", max_epochs=3, logger="tensorboard", resume=True)
    rows = tracked.run.read_metrics()
    for name in ("train_loss", "val_accuracy", "lr"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
        assert scalars(tracked.run.path, name) == expected
    assert tracked.summary["weights_sha256"] == plain.summary["weights_sha256"]


def test_a_tracker_that_cannot_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--logger tensorboard: cannot write to s3://"):
        make_logger("tensorboard", RunDirectory(at("s3://bucket/run")))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--logger wandb: .*pip install 'cifar-dist\[wandb\]'"):
        make_logger("wandb", RunDirectory(tmp_path))


class Collecting(CSVLogger):
    """A tracker of somebody's own: keeps what it is given."""

    seen: ClassVar[list[tuple[int, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append((step, metrics["val_accuracy"]))


def test_a_registered_logger_gets_every_epoch(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, LOGGERS, "collecting", lambda run: Collecting(str(run.path)))
    trained = train_few(tmp_path, "run", max_epochs=2, logger="collecting")
    rows = trained.run.read_metrics()
    assert Collecting.seen == [(row["step"], row["val_accuracy"]) for row in rows]
