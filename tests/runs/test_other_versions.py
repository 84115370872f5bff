"""Runs and searches that other versions wrote, by hand and small."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from cifar_dist.cli import parse_train, parse_tune
from cifar_dist.errors import UserError
from cifar_dist.report import report
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.runs.metrics import METRICS
from cifar_dist.search.directory import SearchDirectory
from cifar_dist.search.trials import TrialTable

OLD = """\
preset: cifar
dataset: cifar10
data_dir: /somewhere/images
num_workers: 1
use_gpu: true
cpus_per_worker: 1.0
gpus_per_worker: 1.0
batch_size: 512
max_epochs: 5
schedule: onecycle
flip: 0.5
precision: '32'
seed: 3
resume: false
"""
"""As version 0.1.0 wrote it, before the preset averaged weights, and without many settings."""

METRICS_OF = """\
epoch,step,samples,world_size,lr,train_loss,train_accuracy,val_loss,val_accuracy,images_per_second,seconds
1,10,100,2,0.1,2.0,0.25,1.5,0.5,300.5,12.5
2,20,200,1,0.1,1.0,0.75,1.25,0.625,301.5,11.5
"""


def without(text: str, column: str) -> str:
    """The text of a CSV file without a column."""
    rows = [line.split(",") for line in text.splitlines()]
    number = rows[0].index(column)
    return "".join(",".join(row[:number] + row[number + 1 :]) + "\n" for row in rows)


def run_of(folder: Path, settings: str = OLD, metrics: str = METRICS_OF) -> RunDirectory:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(settings)
    (folder / "metrics.csv").write_text(metrics)
    return RunDirectory(folder)


def search_of(folder: Path, settings: str = "", metrics: str = METRICS_OF) -> SearchDirectory:
    own = "space: adamw_steplr\nmetric: val_accuracy\nscheduler: none\nworkers_per_trial: 1\n"
    own += "cpus_per_trial: 1.0\ngpus_per_trial: 1.0\n"
    for number in range(2):
        run_of(folder / "trials" / f"t{number:04d}", metrics=metrics)
    (folder / "config.yaml").write_text(own + OLD + settings)
    (folder / "space.yaml").write_text("lr:\n  uniform: [0.1, 0.2]\n")
    return SearchDirectory(folder)


def test_a_run_has_the_defaults_of_settings_that_came_later(tmp_path: Path) -> None:
    config = run_of(tmp_path / "run").read_config()
    assert (config.seed, config.flip, config.data_dir) == (3, 0.5, "/somewhere/images")
    assert (config.ema, config.anneal, config.report) == (0, "cosine", True)
    assert (config.use_gpu, config.gpus_per_worker) == (True, 1)


def test_a_run_of_version_0_1_0_is_resumed(tmp_path: Path, monkeypatch) -> None:
    run_of(tmp_path / "runs" / "run")
    monkeypatch.chdir(tmp_path)
    config = parse_train(["--name", "run", "--resume", "--no-use-gpu", "--num-workers", "2"])
    assert (config.gpus_per_worker, config.ema, config.lr) == (0, 0, 1e-3)
    RunDirectory.existing(config)


def test_a_search_of_version_0_1_0_is_resumed(tmp_path: Path, monkeypatch) -> None:
    search_of(tmp_path / "runs" / "search")
    monkeypatch.chdir(tmp_path)
    config = parse_tune(["--name", "search", "--resume", "--no-use-gpu", "--num-workers", "2"])
    assert (config.workers, config.cpus_per_trial, config.gpus_per_trial) == (2, 2, 0)
    SearchDirectory.existing(config)


def test_a_newer_versions_run_and_search_are_refused_in_one_line(tmp_path: Path) -> None:
    newer = "warp: 9\n"
    for made in (run_of(tmp_path / "run", OLD + newer), search_of(tmp_path / "search", newer)):
        said = r"config\.yaml: the setting warp is unknown to this version, .*; use the newer"
        with pytest.raises(UserError, match=said) as caught:
            made.read_config()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", METRICS[1:])
def test_a_column_that_did_not_exist_is_empty(tmp_path: Path, column: str) -> None:
    rows = run_of(tmp_path / "run", metrics=without(METRICS_OF, column)).read_metrics()
    assert tuple(rows[0]) == METRICS
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row[column] for row in rows] == [None, None]
    run = RunDirectory(tmp_path / "again")
    run.path.mkdir()
    run.write_metrics(rows)
    assert run.read_metrics() == rows


def test_a_column_of_a_newer_version_is_ignored(tmp_path: Path) -> None:
    text = "".join(f"{line},{number}\n" for number, line in enumerate(METRICS_OF.splitlines()))
    rows = run_of(tmp_path / "run", metrics=text).read_metrics()
    assert rows == run_of(tmp_path / "plain").read_metrics()
    run = RunDirectory(tmp_path / "plain")
    run.write_metrics([{**row, "warp": 9} for row in rows])  # as a checkpoint of it holds them
    assert run.read_metrics() == rows


@pytest.mark.parametrize("column", METRICS[1:])
def test_a_report_is_drawn_without_a_column(tmp_path: Path, column: str) -> None:
    run = run_of(tmp_path / "old", metrics=without(METRICS_OF, column))
    whole = run_of(tmp_path / "whole")
    for paths in ([run.path], [run.path, whole.path]):
        page = Path(str(report(paths, str(tmp_path / "page.html")))).read_text()
        assert ">nan" not in page
        assert "(nan" not in page
        assert "<svg" in page


def test_a_searchs_table_has_trials_that_lack_a_column(tmp_path: Path) -> None:
    directory = search_of(tmp_path / "search", metrics=without(METRICS_OF, "seconds"))
    drawn = {0: {"lr": 0.1}, 1: {"lr": 0.2}}
    trial_table = TrialTable(directory.read_config(), directory.read_space(), drawn)
    trial_table.load(directory)
    table = trial_table.write(directory)
    assert list(table["val_accuracy"]) == [0.625, 0.625]
    assert list(table["seconds"]) == [0, 0]
    history = pd.read_parquet(directory.history_file)
    assert list(history.columns) == ["trial_id", *METRICS]
    assert history["seconds"].isna().all()
    assert list(history["world_size"]) == [2, 1, 2, 1]


def test_a_report_is_drawn_of_a_search_whose_tables_lack_columns(tmp_path: Path) -> None:
    directory = search_of(tmp_path / "search")
    drawn = {0: {"lr": 0.1}, 1: {"lr": 0.2}}
    trial_table = TrialTable(directory.read_config(), directory.read_space(), drawn)
    trial_table.load(directory)
    table, history = trial_table.write(directory), trial_table.history()
    table.drop(columns=["best_epoch", "reason"]).to_parquet(directory.trials_parquet)
    history.drop(columns=["world_size", "seconds"]).to_parquet(directory.history_file)
    summary = {"status": "completed", **trial_table.summary(), "seconds": 2.5}
    directory.summary_file.write_text(json.dumps(summary))
    page = Path(str(report([directory.path]))).read_text()
    assert "t0001" in page
    assert "best_epoch" not in page
