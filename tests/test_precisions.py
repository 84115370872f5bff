"""Models of each precision: trained, and used where there is no GPU."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from cifar_dist.config import TrainConfig
from cifar_dist.errors import UserError
from cifar_dist.evaluate import evaluate
from cifar_dist.export import export
from cifar_dist.model_config import NO_HALF_ON_CPU, EvaluateConfig, ExportConfig, PredictConfig
from cifar_dist.predict import predict
from cifar_dist.report import report
from cifar_dist.runs import RunDirectory
from cifar_dist.train import Trained, train
from tests.conftest import encoded, run_command


@pytest.fixture(scope="module")
def trained(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of an epoch on a few digits."""
    storage = tmp_path_factory.mktemp("runs")
    return train(
        TrainConfig(data_dir=str(few_digits), num_workers=0, batch_size=24, flip=0.0,
                    max_epochs=1, lr=3e-4, report=False, storage_path=str(storage), name="run")
    )  # fmt: skip


@pytest.fixture
def half(trained: Trained, tmp_path: Path) -> RunDirectory:
    """The same run, as one that was trained on two GPUs in float16 has it."""
    run = RunDirectory(tmp_path / "half")
    shutil.copytree(Path(str(trained.run.path)), Path(str(run.path)))
    config = trained.run.read_config()
    run.write_config(
        dataclasses.replace(
            config, use_gpu=True, gpus_per_worker=None, num_workers=2, precision="16-mixed"
        )
    )
    return run


def test_a_model_of_float16_is_evaluated_in_float32_where_no_gpu_is_used(
    half: RunDirectory, trained: Trained
) -> None:
    heard: list[dict] = []
    found = evaluate(EvaluateConfig(model=str(half.path)), heard.append)
    assert found.scores.accuracy == trained.summary["test_accuracy"]
    assert found.scores.loss == pytest.approx(trained.summary["test_loss"], rel=1e-5)
    assert heard == [{"kind": "warning", "message": NO_HALF_ON_CPU}]


def test_predict_says_in_one_line_that_it_computes_in_float32(
    half: RunDirectory, trained: Trained, few_digits: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(encoded(np.full((32, 32, 3), 90, np.uint8)))
    done = run_command(tmp_path, str(half.path), str(picture), module="cifar_dist.predict")
    assert done.code == 0, done.err
    assert done.err.splitlines()[0] == NO_HALF_ON_CPU
    assert done.err.count("float32") == 1
    of_float32 = predict(PredictConfig(model=str(trained.run.path), images=(str(picture),)))
    ((name, probability),) = next(of_float32).classes
    assert done.out.split()[:2] == [name, f"{probability:.4f}"]


def test_what_was_typed_is_still_refused(half: RunDirectory) -> None:
    with pytest.raises(UserError, match="--precision 16-mixed: needs --use-gpu"):
        evaluate(EvaluateConfig(model=str(half.path), precision="16-mixed"))


def test_a_model_of_float16_is_exported_and_reported(half: RunDirectory, trained: Trained) -> None:
    found = export(ExportConfig(model=str(half.path), check_images=20))
    assert found.same_class == found.images == 20
    half.answers_file.unlink()
    page = Path(str(report([half.path]))).read_text()
    right = round(trained.summary["test_accuracy"] * 40)
    assert f"{right} of 40 test images were answered rightly" in page
