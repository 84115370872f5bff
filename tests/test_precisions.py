"""Models of each precision, and a compiled one: trained for an epoch, then used without a GPU."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from cifar_dist.config.model import EvaluateConfig, ExportConfig, PredictConfig
from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import UserError
from cifar_dist.evaluate import evaluate
from cifar_dist.events import Warned
from cifar_dist.export import export
from cifar_dist.inference.lookup import NO_HALF_ON_CPU
from cifar_dist.inference.model import model_of
from cifar_dist.predict import predict
from cifar_dist.report import report
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.train import Trained, train
from tests.conftest import encoded, run_command
from tests.training.small import half_on_cpu


@pytest.fixture(scope="module")
def trained(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of an epoch on a few digits."""
    return train_one(few_digits, tmp_path_factory.mktemp("runs"))


def train_one(few_digits: Path, folder: Path, **settings) -> Trained:
    return train(
        TrainConfig(data_dir=str(few_digits), num_workers=0, batch_size=72, flip=0.0, max_epochs=1,
                    lr=3e-4, report=False, storage_path=str(folder), name="run", **settings)
    )  # fmt: skip


def compiled(few_digits: Path, folder: Path) -> Trained:
    """Compiled by inductor, as on any machine; nothing stands in for it."""
    torch._dynamo.reset()
    counters.clear()
    trained = train_one(few_digits, folder, compile=True)
    # A graph for batches of training, one for validation, one for the test; and no step without.
    assert counters["stats"]["unique_graphs"] == 3
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"]
    assert not counters["graph_break"]
    return trained


def float16(few_digits: Path, folder: Path) -> Trained:
    """In float16 with a gradient scaler; its settings are those of a run on two GPUs."""
    with half_on_cpu(2.0**7):  # with torch's own, 2**16, the first step's gradients overflow
        trained = train_one(few_digits, folder)
    on_gpus = {"use_gpu": True, "gpus_per_worker": None, "num_workers": 2}
    config = trained.run.read_config()
    trained.run.write_config(config.replace(precision="16-mixed", **on_gpus))
    return trained


def bfloat16(few_digits: Path, folder: Path) -> Trained:
    return train_one(few_digits, folder, precision="bf16-mixed", channels_last=True)


@pytest.fixture(
    scope="module",
    params=[pytest.param(compiled, marks=pytest.mark.slow), float16, bfloat16],
)
def of_a_kind(
    request: pytest.FixtureRequest, few_digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    return request.param(few_digits, tmp_path_factory.mktemp("kinds"))


def test_it_trains_and_is_evaluated_to_what_the_run_found(of_a_kind: Trained) -> None:
    (row,) = of_a_kind.outcome.history
    assert (row["samples"], row["step"]) == (144, 2)
    assert math.isfinite(row["train_loss"])
    found = evaluate(EvaluateConfig(model=str(of_a_kind.run.path))).scores
    # Other batches, and float32 in the place of float16, round otherwise; at most one image turns.
    assert found.loss == pytest.approx(of_a_kind.summary["test_loss"], rel=2e-2)
    assert found.accuracy == pytest.approx(of_a_kind.summary["test_accuracy"], abs=1 / 40 + 1e-6)


def test_it_predicts_what_it_is_evaluated_to(of_a_kind: Trained, tmp_path: Path) -> None:
    files = [tmp_path / f"{grey}.png" for grey in (0, 90)]
    for file in files:
        file.write_bytes(encoded(np.full((32, 32, 3), int(file.stem), np.uint8)))
    config = PredictConfig(
        model=str(of_a_kind.run.path), images=tuple(map(str, files)), top=10, batch_size=1
    )
    found = list(predict(config))
    assert [each.image for each in found] == list(map(str, files))
    model, about = model_of(config, use_gpu=False, precision="32")
    pixels = np.stack([np.full((3, 32, 32), grey, np.uint8) for grey in (0, 90)])
    odds = model.logits(torch.from_numpy(pixels)).double().softmax(dim=1)
    for each, row in zip(found, odds, strict=True):
        assert dict(each.classes) == pytest.approx(
            dict(zip(about.classes, row.tolist(), strict=True)), abs=2e-2
        )


def test_it_is_exported_with_the_logits_of_its_weights(of_a_kind: Trained, tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    config = ExportConfig(model=str(of_a_kind.run.path), output=str(file), check_images=20)
    assert export(config).same_class == 20
    assert file.stat().st_size > 40e6


@pytest.fixture
def half(trained: Trained, tmp_path: Path) -> RunDirectory:
    """The same run, as one that was trained on two GPUs in float16 has it."""
    run = RunDirectory(tmp_path / "half")
    shutil.copytree(Path(str(trained.run.path)), Path(str(run.path)))
    config = trained.run.read_config()
    on_gpus = {"use_gpu": True, "gpus_per_worker": None, "num_workers": 2}
    run.write_config(config.replace(precision="16-mixed", **on_gpus))
    return run


def test_a_model_of_float16_is_evaluated_in_float32_where_no_gpu_is_used(
    half: RunDirectory, trained: Trained
) -> None:
    heard: list[dict] = []
    found = evaluate(EvaluateConfig(model=str(half.path)), heard.append)
    assert found.scores.accuracy == trained.summary["test_accuracy"]
    assert found.scores.loss == pytest.approx(trained.summary["test_loss"], rel=1e-5)
    assert heard == [Warned(NO_HALF_ON_CPU)]


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
    half.predictions_file.unlink()
    page = Path(str(report([half.path]))).read_text()
    right = round(trained.summary["test_accuracy"] * 40)
    assert f"{right} of 40 test images were classified correctly" in page
