"""Runs and a search that version 0.1.0 wrote are resumed, evaluated and reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from cifar_dist.cluster.trials import TrialWork, train_here
from cifar_dist.config.model import EvaluateConfig, ExportConfig, PredictConfig
from cifar_dist.config.train import TrainConfig
from cifar_dist.config.tune import TuneConfig
from cifar_dist.errors import UserError
from cifar_dist.evaluate import evaluate
from cifar_dist.events import Event, Warned
from cifar_dist.export import export
from cifar_dist.predict import predict
from cifar_dist.registry import NETWORKS
from cifar_dist.report import report
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.runs.metrics import METRICS
from cifar_dist.search.directory import SearchDirectory
from cifar_dist.train import train
from cifar_dist.tune import search
from tests.registering import register

WRITTEN = Path(__file__).parent / "version_0_1_0"


class TinyNetwork(nn.Module):
    """The network that stood in for ResNet-18 when the runs were written."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=4, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.bn1(self.conv1(images)).relu().mean((2, 3)))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, NETWORKS, "resnet18", TinyNetwork)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A copy of what was written: using it changes it."""
    folder = tmp_path / "runs"
    shutil.copytree(WRITTEN, folder)
    return folder


def resumed(folder: Path, name: str, **changes) -> TrainConfig:
    """The config of ``--resume``, as the command line makes it."""
    config = RunDirectory.at(str(folder), name).read_config()
    return config.replace(storage_path=str(folder), name=name, resume=True, **changes)


def test_a_run_is_resumed(written: Path) -> None:
    before = RunDirectory.at(str(written), "run").read_metrics()
    heard: list[Event] = []
    trained = train(resumed(written, "run", max_epochs=3), heard.append)
    rows = trained.run.read_metrics()
    assert rows[:2] == before
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[2]["train_loss"] < rows[1]["train_loss"]
    # It does not promise the bits of a run of one version throughout, and says so.
    (warned,) = (event for event in heard if isinstance(event, Warned))
    assert "is of a version with another order of images" in warned.message
    assert trained.run.find_predictions() == trained.run.predictions_file  # of the new epochs


def test_a_finished_run_with_a_schedule_by_step_keeps_its_length(written: Path) -> None:
    with pytest.raises(
        UserError, match="--max-epochs 4: the run's schedule, onecycle, spans 2 epochs"
    ):
        train(resumed(written, "run-onecycle", max_epochs=4))
    summary = json.loads((written / "run-onecycle" / "summary.json").read_text())
    trained = train(resumed(written, "run-onecycle"))
    assert trained.summary["weights_sha256"] == summary["weights_sha256"]


def test_a_run_is_evaluated_exported_and_predicts(written: Path) -> None:
    model = str(written / "run")
    said = json.loads((written / "run" / "summary.json").read_text())
    found = evaluate(EvaluateConfig(model=model)).scores
    assert found.accuracy == said["test_accuracy"]
    assert found.loss == pytest.approx(said["test_loss"], rel=1e-6)
    hardest = str(written / "run" / "hardest-test")
    assert len(list(predict(PredictConfig(model=model, images=(hardest,))))) == 24
    assert export(ExportConfig(model=model, format="safetensors")).largest_difference < 1e-3


def test_a_run_and_a_search_are_reported(written: Path) -> None:
    for name, text in (("run", "test images were classified correctly"), ("search", "t0005")):
        page = Path(str(report([str(written / name)])))
        assert text in page.read_text()


def test_what_a_version_did_not_record_is_empty(written: Path) -> None:
    run = RunDirectory.at(str(written), "run")
    rows = pd.read_csv(Path(str(run.metrics_file)))
    rows.drop(columns="lr").to_csv(Path(str(run.metrics_file)), index=False)
    assert [row["lr"] for row in run.read_metrics()] == [None, None]
    assert all(row.keys() == set(METRICS) for row in run.read_metrics())
    report([str(run.path)])


def tiny_training(work: TrialWork) -> None:
    """Train a trial with the tiny network: trials run in processes of their own."""
    NETWORKS.register("resnet18", TinyNetwork)
    torch.set_num_threads(1)
    return train_here(work)


def test_a_search_is_continued(written: Path, ray_cluster: None) -> None:
    before = pd.read_csv(written / "search" / "trials.csv")
    config = SearchDirectory.at(str(written), "search").read_config()
    assert isinstance(config, TuneConfig)
    base = config.train.replace(
        storage_path=str(written), name="search", resume=True, report=True, data_dir=str(written)
    )
    searched = search(config.replace(train=base, num_samples=8), training=tiny_training)
    table = searched.table
    # What was drawn, run and stopped before stays, and the new trials are judged by it.
    kept = table[: len(before)][before.columns]
    pd.testing.assert_frame_equal(
        kept.drop(columns=["reason", "error"]), before.drop(columns=["reason", "error"]),
        check_dtype=False,
    )  # fmt: skip
    assert len(table) == 8
    assert set(table["status"]) <= {"completed", "stopped"}
    assert (written / "search" / "report.html").is_file()
