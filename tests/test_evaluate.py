"""What `evaluate` measures: each image once, the run's own metrics, whatever the workers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cifar_dist.config.model import EvaluateConfig, PredictConfig
from cifar_dist.config.train import TrainConfig
from cifar_dist.data.cache import CachedDataset, prepare
from cifar_dist.data.datasets import LabelledImages, find_source
from cifar_dist.errors import UserError
from cifar_dist.evaluate import Evaluated, _text, _write_hardest, evaluate
from cifar_dist.inference.lookup import trained_config
from cifar_dist.inference.model import load_trained
from cifar_dist.inference.predictions import Predictions
from cifar_dist.inference.scores import score
from cifar_dist.inference.sharded import shard_logits
from cifar_dist.model.weights import read_weights
from cifar_dist.predict import predict
from cifar_dist.train import Trained, train
from tests.conftest import run_command


@pytest.fixture(scope="module")
def trained(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of three epochs on a few digits."""
    storage = tmp_path_factory.mktemp("runs")
    return train(
        TrainConfig(data_dir=str(few_digits), num_workers=0, batch_size=24, flip=0.0,
                    max_epochs=3, lr=3e-4, report=False, storage_path=str(storage), name="run")
    )  # fmt: skip


@pytest.fixture(scope="module")
def dataset(few_digits: Path) -> CachedDataset:
    return prepare("cifar10", find_source("cifar10", str(few_digits)))


def evaluated(trained: Trained, **settings) -> Evaluated:
    return evaluate(EvaluateConfig(model=str(trained.run.path), **settings))


def test_it_finds_what_the_run_found(trained: Trained) -> None:
    test, val = (evaluated(trained, split=split).scores for split in ("test", "val"))
    assert (test.images, val.images) == (40, 16)
    assert test.accuracy == trained.summary["test_accuracy"]
    assert test.loss == pytest.approx(trained.summary["test_loss"], rel=1e-5)
    assert val.accuracy == trained.summary["val_accuracy"]
    assert evaluated(trained, split="train").scores.images == 144


def test_the_run_kept_the_predictions_that_are_found_again(
    trained: Trained, dataset: CachedDataset
) -> None:
    kept = Predictions.from_bytes(trained.run.predictions_file.read_bytes())
    again = score(kept.logits, kept.labels, kept.classes)
    found = evaluated(trained).scores
    assert np.array_equal(again.confusion, found.confusion)
    assert again.accuracy == trained.summary["test_accuracy"]
    assert again.loss == pytest.approx(found.loss, rel=1e-5)
    assert (kept.split, kept.epoch) == ("test", trained.summary["best_epoch"])
    assert kept.classes == dataset.classes
    assert np.array_equal(kept.pictures, dataset.open()[1].images[kept.mistakes])


def test_files_hold_what_is_returned(trained: Trained) -> None:
    found = evaluated(trained)
    saved = json.loads((trained.run.path / "evaluation-test.json").read_text())
    assert saved == found.to_dict()
    assert np.sum(saved["confusion"]) == saved["images"] == 40
    table = pd.read_csv(trained.run.path / "evaluation-test.csv")
    assert list(table) == ["class", "images", "precision", "recall", "f1"]
    assert table["images"].sum() == 40
    hardest = sorted((trained.run.path / "hardest-test").iterdir())
    assert len(hardest) == 24
    assert hardest[0].name.startswith("01-")
    # The label is the least probable for the first: the model predicts another class.
    first = next(predict(PredictConfig(model=str(trained.run.path), images=(str(hardest[0]),))))
    assert first.classes[0][0] != hardest[0].stem.removeprefix("01-")


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_workers_parts_make_up_the_whole_to_the_bit(
    trained: Trained, dataset: CachedDataset, workers: int
) -> None:
    config = trained_config(EvaluateConfig(model=str(trained.run.path)))
    weights = read_weights(str(trained.run.model_file))
    model = load_trained("weights", weights, config, dataset.about)
    whole = shard_logits(model, dataset, "test", 12)
    parts = [shard_logits(model, dataset, "test", 12, rank, workers) for rank in range(workers)]
    assert whole.shape == (40, 10)
    assert np.array_equal(np.concatenate(parts), whole)


def test_workers_under_ray_give_the_same_figures(trained: Trained, ray_cluster: None) -> None:
    alone = evaluated(trained, batch_size=12)
    shared = evaluated(trained, batch_size=12, num_workers=2)
    assert np.array_equal(shared.scores.confusion, alone.scores.confusion)
    assert shared.scores.accuracy == alone.scores.accuracy
    assert shared.scores.loss == pytest.approx(alone.scores.loss, rel=1e-5)


def test_weights_of_ones_own_are_measured_too(
    trained: Trained, few_digits: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.pth"
    torch.save(read_weights(str(trained.run.model_file)), file)
    config = EvaluateConfig(
        model=str(file), data_dir=str(few_digits), output=str(tmp_path / "measured")
    )
    assert evaluate(config).scores.accuracy == trained.summary["test_accuracy"]
    assert (tmp_path / "measured" / "evaluation-test.csv").is_file()


def test_figures_are_those_of_the_definitions() -> None:
    # Four images of two classes, predicted with confidence 0.8, 0.6, 0.8 and 0.6, one wrongly.
    odds = np.log(np.array([[4, 1], [1.5, 1], [1, 4], [1.5, 1]]))
    labels = np.array([0, 0, 1, 1])
    found = score(odds.astype(np.float32), labels, ("cat", "dog"))
    assert found.accuracy == 0.75
    assert found.loss == pytest.approx(-np.log([0.8, 0.6, 0.8, 0.4]).mean())
    # Of two predictions with 0.8 both are correct, of two with 0.6 one is.
    assert found.ece == pytest.approx((2 * 0.2 + 2 * 0.1) / 4, abs=1e-6)
    assert found.confusion.tolist() == [[2, 0], [1, 1]]
    assert found.per_class.to_dict("list") == {
        "class": ["cat", "dog"],
        "images": [2, 2],
        "precision": [pytest.approx(2 / 3), 1.0],
        "recall": [1.0, 0.5],
        "f1": [pytest.approx(0.8), pytest.approx(2 / 3)],
    }


def printed(classes: tuple[str, ...]) -> list[str]:
    scores = score(np.eye(len(classes), dtype=np.float32), np.arange(len(classes)), classes)
    return _text(Evaluated(Path("w"), "trees", "test", scores, None), "w").splitlines()


def test_classes_that_begin_alike_are_told_apart_in_print() -> None:
    lines = printed(("tree frog", "tree house", "tree"))
    header = lines[
        lines.index("confusion matrix, a row for each label, a column for each prediction:") + 1
    ]
    assert header.split() == ["tree", "frog", "tree", "house", "tree"]


def test_a_confusion_matrix_too_wide_to_read_is_not_printed() -> None:
    lines = printed(tuple(map(str, range(300))))
    assert lines[-1] == "confusion of 300 classes: too wide to print; --format json has it"
    assert max(map(len, lines)) < 100


def test_the_hardest_of_300_classes_are_named_by_their_own(tmp_path: Path) -> None:
    labels = np.array([299, 256, 0, 43], np.int16)
    classes = (*(f"class/{number}" for number in range(299)), "the last one")
    logits = np.zeros((4, 300), np.float32)
    logits[range(4), labels] = [1, 2, 3, 4]
    images = LabelledImages(np.zeros((4, 1, 8, 8), np.uint8), labels)
    _write_hardest(tmp_path, "test", logits, images, np.arange(4), classes)
    assert sorted(file.name for file in (tmp_path / "hardest-test").iterdir()) == [
        "01-the_last_one.png", "02-class_256.png", "03-class_0.png", "04-class_43.png"
    ]  # fmt: skip


def test_other_data_than_the_runs_is_refused(trained: Trained, small_parquet: Path) -> None:
    with pytest.raises(UserError, match="holds other data than the run was trained on"):
        evaluated(trained, data_dir=str(small_parquet))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Missing from python -m cifar_dist.evaluate: RUN|WEIGHTS"),
        (["runs/none"], "runs/none: there is no such file; give a run's directory"),
        (["."], ".: is neither a run nor weights"),
        (["{run}", "--stem", "cifar"], "--stem cifar: the run was trained with imagenet"),
        (["{run}", "--splt", "val"], "unknown flag --splt: did you mean --split?"),
    ],
)
def test_bad_usage_is_one_line(trained: Trained, tmp_path: Path, words: list[str], said: str):
    words = [word.format(run=trained.run.path) for word in words]
    done = run_command(tmp_path, *words, module="cifar_dist.evaluate")
    assert done.code == 2
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1
