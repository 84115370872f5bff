"""A run's page: what its files say, what is missing from them, and reports of real runs."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cifar_dist.config.train import TrainConfig
from cifar_dist.events import Event, Warned
from cifar_dist.inference.predictions import Predictions
from cifar_dist.reports.attempt import leave_report
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.train import train
from tests.conftest import ROOT
from tests.processes import PATIENCE_S
from tests.reports.pages import Read, history, make_run, predictions, read


def test_a_runs_page_says_what_its_files_say(pages: dict[str, Path], run: RunDirectory) -> None:
    assert pages["run"] == run.path / "report.html"
    page = Read(pages["run"])
    assert page.all("html")[0]["lang"] == "en"
    for said in ("0.9500", "loss 0.2500", "0.7333", "epoch 3", "1:01:40", "502", "completed",
                 "57 of 60 test images were classified correctly, by the weights of epoch 3",
                 "Epoch 3 ended with 1 workers, the one before with 2.",
                 "1 restart of workers after failures"):  # fmt: skip
        assert said in page.text
    table = page.tables["Precision, recall and F1 by class"]
    assert [cell.strip() for cell in table[0]] == ["class", "images", "precision", "recall", "F1"]
    assert table[1 + 3] == ["cat", "6", "1.0000", "0.5000", "0.6667"]
    assert table[1 + 5] == ["dog", "6", "0.6667", "1.0000", "0.8000"]
    settings = dict(row for row in page.tables["Settings"])
    assert (settings["lr"], settings["max_epochs"]) == ("0.002", "3")
    assert dict(row for row in page.tables["Environment"])["python"] == "3.11.7"
    confusion = next(svg for svg in page.all("svg") if "confusion" in str(svg["aria-label"]))
    assert "57 on the diagonal; most often confused: cat predicted as dog, 3 times" in str(
        confusion["aria-label"]
    )


def test_mistakes_are_shown_the_most_confident_first_with_both_labels(
    pages: dict[str, Path], run: RunDirectory
) -> None:
    page = Read(pages["run"])
    assert [image["alt"] for image in page.all("img")] == ["labelled cat, predicted dog"] * 3
    confidences = re.findall(r"dog([\d.]+)%", page.text.replace(" ", "").replace("\n", ""))
    # exp(odds) against exp(3) for the label and 1 for each of eight others.
    expected = [np.exp(o) / (np.exp(o) + np.exp(3) + 8) for o in (9, 6, 4)]
    assert [float(each) / 100 for each in confidences] == pytest.approx(expected, abs=5e-4)
    first = str(page.all("img")[0]["src"]).removeprefix("data:image/png;base64,")
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(first))))
    kept = predictions()
    assert kept.mistakes.tolist() == [13, 23, 3]
    assert np.array_equal(pixels, kept.pictures[0].transpose(1, 2, 0))


# --- what is not there -----------------------------------------------------------------------


def test_an_interrupted_run_shows_its_curves_so_far(folder: Path) -> None:
    page = read(make_run(folder, "interrupted", epochs=2, status="interrupted"))
    assert "The run has not reached its last epoch: 2 of 3 epochs so far." in page.text
    assert "There are no weights to evaluate" in page.text
    assert len(page.all("svg")) == 4


def test_a_run_without_an_epoch_or_a_summary_has_a_page_too(folder: Path) -> None:
    run = make_run(folder, "begun", epochs=0, status="failed")
    run.summary_file.unlink()
    run.environment_file.unlink()
    page = read(run)
    assert "not ended" in page.text
    assert "No epoch has finished yet." in page.text
    assert "The run ended before its environment was written." in page.text


def test_a_run_that_diverged_shows_the_epochs_before(folder: Path) -> None:
    run = make_run(folder, "diverged", status="failed")
    rows = history(3)
    rows[-1].update(train_loss=float("nan"), val_loss=float("inf"))
    run.write_metrics(rows)
    assert len(read(run).all("svg")) == 4


def test_without_the_runs_images_the_page_says_so(folder: Path, tmp_path: Path) -> None:
    run = make_run(folder, "elsewhere", data_dir=str(tmp_path))
    run.model_file.write_bytes(b"weights")
    page = read(run)
    assert (
        f"Classes and mistakes cannot be evaluated here. {tmp_path}: has no CIFAR-10" in page.text
    )
    assert list(tmp_path.iterdir()) == []  # nothing was downloaded


def test_what_was_kept_needs_neither_torch_nor_ray(run: RunDirectory, folder: Path) -> None:
    code = """
import sys
from cifar_dist.report import report
report([sys.argv[1]], sys.argv[2])
loaded = {"torch", "ray", "lightning", "torchmetrics"} & set(sys.modules)
sys.exit(" ".join(loaded) or 0)
"""
    words = [sys.executable, "-c", code, str(run.path), str(folder / "lean.html")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "57 of 60 test images" in Read(folder / "lean.html").text


def test_predictions_are_found_by_the_name_of_version_0_1(run: RunDirectory, folder: Path) -> None:
    old = RunDirectory(folder / "old")
    shutil.copytree(run.path, old.path)
    old.predictions_file.rename(old.path / "test-answers.safetensors")
    assert "57 of 60 test images were classified correctly" in read(old).text


# --- real runs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    storage = tmp_path_factory.mktemp("trained")
    config = TrainConfig(
        data_dir=str(few_digits), num_workers=0, batch_size=48, flip=0.0, max_epochs=1, lr=3e-4,
        storage_path=str(storage), name="real",
    )  # fmt: skip
    return train(config).run


def test_a_run_leaves_its_report_and_predictions_computed_again_are_the_same(
    trained: RunDirectory, tmp_path: Path
) -> None:
    by_itself = Read(Path(str(trained.report_file)))
    right = round(trained.read_summary()["test_accuracy"] * 40)
    assert f"{right} of 40 test images were classified correctly" in by_itself.text
    before = Predictions.from_bytes(trained.predictions_file.read_bytes())
    assert before.epoch == trained.read_summary()["best_epoch"]
    without = tmp_path / "real"
    shutil.copytree(trained.path, without)
    RunDirectory(without).predictions_file.unlink()
    again = read(without)
    assert again.tables == by_itself.tables
    assert [image["src"] for image in again.all("img")] == [
        image["src"] for image in by_itself.all("img")
    ]


def test_test_images_are_not_used_until_a_run_is_over(
    trained: RunDirectory, tmp_path: Path
) -> None:
    unfinished = RunDirectory(tmp_path / "real")
    shutil.copytree(trained.path, unfinished.path)
    unfinished.predictions_file.unlink()
    unfinished.write_summary("cifar10", "interrupted")
    assert "of 16 validation images were classified correctly" in read(unfinished).text


def test_a_report_that_fails_does_not_fail_the_run(
    trained: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Event] = []
    broken = RunDirectory(tmp_path / "real")
    shutil.copytree(trained.path, broken.path)
    broken.config_file.write_text("lr: [\n")
    leave_report(broken, heard.append)
    (warning,) = heard
    assert isinstance(warning, Warned)
    assert warning.message.startswith("no report.html: ")
    assert "\n" not in warning.message
