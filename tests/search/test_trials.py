"""The tables of a search: what counts, what does not, and that they read back."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from cifar_dist.config.files import read_settings
from cifar_dist.config.train import make_config
from cifar_dist.config.tune import make_tune_config
from cifar_dist.runs.metrics import METRICS
from cifar_dist.search.directory import SearchDirectory
from cifar_dist.search.space import read_space
from cifar_dist.search.trials import TrialTable

SPACE = "lr: {choice: [0.1, 0.01, 0.001, 0.0001]}\noptimizer: {choice: [sgd, adamw]}\n"
DRAWN = {n: {"lr": 10.0**-n, "optimizer": "sgd"} for n in range(1, 5)}
DRAWN = {number - 1: values for number, values in DRAWN.items()}


def row(epoch: int, accuracy: float) -> dict:
    return {
        **dict.fromkeys(METRICS, 0.5),
        "epoch": epoch,
        "step": epoch,
        "samples": epoch,
        "world_size": 1,
        "val_accuracy": accuracy,
        "val_loss": 1 - accuracy,
        "seconds": 2.0,
    }


@pytest.fixture
def trial_table(tmp_path: Path) -> TrialTable:
    """t0000 completed, t0001 stopped after it had run on, t0002 failed, t0003 not started."""
    file = tmp_path / "space.yaml"
    file.write_text(SPACE)
    settings = {"dataset": "digits", "num_samples": 4, "max_epochs": 3, "space": str(file)}
    trial_table = TrialTable(make_tune_config(settings), read_space(str(file)), DRAWN)
    for epoch, accuracy in ((1, 0.2), (2, 0.9)):
        trial_table.start(1)
        trial_table.add_row(1, row(epoch, accuracy))
    for epoch, accuracy in ((1, 0.5), (2, 0.8), (3, 0.7)):
        trial_table.add_row(0, row(epoch, accuracy))
    trial_table.end(0)
    trial_table.add_row(2, row(1, 0.95))
    trial_table.end(2, "ZeroDivisionError: division by zero")
    return trial_table


def test_every_trial_is_one_row_with_why_it_ended(trial_table: TrialTable) -> None:
    table = trial_table.table()
    assert list(table.columns) == [
        "trial_id", "status", "lr", "optimizer", "epochs", "best_epoch", "val_accuracy", "val_loss",
        "seconds", "reason", "error",
    ]  # fmt: skip
    assert list(table["trial_id"]) == ["t0000", "t0001", "t0002", "t0003"]
    assert list(table["status"]) == ["completed", "stopped", "failed", "unfinished"]
    assert list(table["epochs"]) == [3, 1, 1, 0]
    assert list(table["val_accuracy"][:3]) == [0.8, 0.2, 0.95]
    assert list(table["best_epoch"][:3]) == [2, 1, 1]
    assert list(table["seconds"]) == [6.0, 2.0, 2.0, 0.0]
    assert table["reason"][1] == ("ASHA: val_accuracy 0.2000 at epoch 1 is below the cut of 0.5000")
    assert table["reason"][3] == "not started"
    assert table["error"][2] == "ZeroDivisionError: division by zero"
    assert pd.isna(table["val_accuracy"][3])


def test_epochs_beyond_a_rung_where_a_trial_stops_do_not_count(trial_table: TrialTable) -> None:
    history = trial_table.history()
    assert list(history.columns) == ["trial_id", *METRICS]
    assert list(history[history["trial_id"] == "t0001"]["epoch"]) == [1]
    summary = trial_table.summary()
    assert (summary["epochs"], summary["epochs_run"], summary["epochs_possible"]) == (5, 6, 12)


def test_the_best_trial_is_one_that_completed(trial_table: TrialTable) -> None:
    assert trial_table.best() == 0
    assert trial_table.summary()["val_accuracy"] == 0.8


def test_files_read_back_as_the_table(trial_table: TrialTable, tmp_path: Path) -> None:
    directory = SearchDirectory(tmp_path)
    table = trial_table.write(directory)
    pd.testing.assert_frame_equal(pd.read_parquet(directory.trials_parquet), table)
    read = pd.read_csv(directory.trials_csv)
    for name in ("trial_id", "status", "lr", "epochs", "val_accuracy", "val_loss", "seconds"):
        pd.testing.assert_series_equal(read[name], table[name], check_dtype=False)
    pd.testing.assert_frame_equal(pd.read_parquet(directory.history_file), trial_table.history())
    best = make_config(read_settings(directory.best_file))
    assert (best.lr, best.optimizer, best.max_epochs, best.name) == (0.1, "sgd", 3, None)


def test_values_of_different_types_become_text(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("weights: {choice: [none, imagenet]}\nflip: {choice: [0.5, null]}\n")
    drawn = {0: {"weights": "none", "flip": 0.5}, 1: {"weights": "imagenet", "flip": None}}
    config = make_tune_config({"dataset": "digits", "space": str(file)})
    trial_table = TrialTable(config, read_space(str(file)), drawn)
    trial_table.write(SearchDirectory(tmp_path))
    read = pd.read_parquet(SearchDirectory(tmp_path).trials_parquet)
    assert list(read["weights"]) == ["none", "imagenet"]


def test_what_is_on_disk_is_taken_up(trial_table: TrialTable, tmp_path: Path) -> None:
    directory = SearchDirectory(tmp_path)
    for number, rows in ((0, 3), (1, 2), (2, 1)):
        run = directory.trial(number)
        run.begin(trial_table.trial_config(DRAWN[number]))
        run.write_metrics(trial_table._trials[number].rows[:rows])
    directory.trial(0).write_summary("digits", "completed")
    directory.trial(2).write_summary(
        "digits", "failed", error="ZeroDivisionError: division by zero"
    )
    again = TrialTable(trial_table.config, trial_table.space, DRAWN)
    again.load(directory)
    pd.testing.assert_frame_equal(again.table(), trial_table.table())
    assert [again.finished(number) for number in range(4)] == [True, True, True, False]
