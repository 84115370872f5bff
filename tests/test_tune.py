"""``python -m cifar_dist.tune`` as a user types it: output, files, exit codes, kills."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from cifar_dist.runs.directory import RunDirectory
from cifar_dist.search.directory import SearchDirectory
from tests.conftest import PYTHON_PATH, Finished, run_command
from tests.processes import PATIENCE_S
from tests.test_train import one_line
from tests.training.test_fit import without_timing

TUNE = "cifar_dist.tune"
SEED = int(os.environ.get("CIFAR_DIST_FAULTS_SEED", "1"))
"""Of the moment of a kill."""


def test_the_best_trials_settings_train_to_its_accuracy(tmp_path: Path, few_digits: Path) -> None:
    done = run_command(
        tmp_path, "--data-dir", str(few_digits), "--batch-size", "36", "--num-samples", "4",
        "--max-epochs", "2", "--seed", "3", "--name", "s", module=TUNE,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert len(lines) < 30
    search = tmp_path / "runs" / "s"
    table = pd.read_csv(search / "trials.csv")
    assert "stopped" in set(table["status"])
    assert sum(line.startswith("t000") for line in lines) == 4
    summary = json.loads((search / "summary.json").read_text())
    assert f"{summary['epochs_run']} of 8 epochs run" in done.out
    assert lines[-1] == f"next: python -m cifar_dist.train --config {Path('runs/s/best.yaml')}"
    assert (search / "report.html").read_bytes().startswith(b"<!doctype html>")
    assert not list(search.glob("trials/*/report.html"))
    trained = run_command(tmp_path, "--config", "runs/s/best.yaml", "--name", "best")
    assert (trained.code, trained.err) == (0, "")
    best = table[table["trial_id"] == summary["best_trial"]].iloc[0]
    run = RunDirectory.at(str(tmp_path / "runs"), "best")
    assert run.read_summary()["val_accuracy"] == best["val_accuracy"]
    trial = RunDirectory(search / "trials" / best["trial_id"])
    assert without_timing(run) == without_timing(trial)
    # A trial leaves the test images alone, and keeps no checkpoints when it is over.
    assert trial.read_summary()["test_accuracy"] is None
    assert trial.read_summary()["weights_sha256"] == run.read_summary()["weights_sha256"]
    assert not trial.checkpoints.exists()


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--space", "adamw_step"],
            "unknown space adamw_step (--space): did you mean adamw_steplr?",
        ),
        (["--space", "none.yaml"], "--space none.yaml: cannot be read"),
        (["--metric", "accuracy"], "--metric"),
        (["--time-budget", "soon"], "--time-budget soon: must be seconds above 0"),
        (["--num-samples", "0"], "--num-samples 0: must be from 1"),
        (["--grace-period", "20"], "--grace-period 20: is above --max-epochs 9"),
        (["--num-sample", "3"], "unknown flag --num-sample: did you mean --num-samples?"),
        (["--search", "grid"], "--search grid: lr (in "),
        (["--lr", "1", "--weight-decay", "0", "--step-size", "1", "--gamma", "1"], "nothing is l"),
        (["--resume", "--name", "none"], "there is no search in"),
        (["--storage-path", "/proc/runs"], "--storage-path /proc/runs: cannot be written"),
        (["--weights", "missing.safetensors"], "--weights /"),
    ],
)
def test_bad_usage_is_refused_in_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    assert said in one_line(run_command(tmp_path, "--dataset", "digits", *words, module=TUNE))
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lrr: {uniform: [0.1, 1]}", "unknown setting lrr (in my.yaml): did you mean lr?"),
        ("lr: {uniform: [1, 0.1]}", "lr: uniform [1, 0.1] (in my.yaml): must be"),
        ("batch_size: {choice: [1]}", "--batch-size 1: must be 2 or more"),
        ("lr: [", "--space my.yaml: is not YAML"),
        ("crop_padding: {choice: [4, 33]}", "--crop-padding 33: images are 32 pixels wide; lower"),
    ],
)
def test_a_bad_space_is_refused_with_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "my.yaml").write_text(text)
    words = ["--dataset", "digits", "--space", "my.yaml"]
    found = one_line(run_command(tmp_path, *words, module=TUNE))
    assert said in found
    assert "my.yaml" in found
    assert not list((tmp_path / "runs").glob("*"))


def test_gpus_that_are_not_there_are_refused(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    words = ["--dataset", "digits", "--use-gpu", "--gpus-per-trial", "0.5"]
    said = one_line(run_command(tmp_path, *words, module=TUNE))
    assert re.search(r"needs 1 x \(1 CPU, 0.5 GPU\), and the cluster has \d+ CPU, 0 GPU", said)
    assert not list((tmp_path / "runs").iterdir())


# --- kills -----------------------------------------------------------------------------------

SEARCH = """
from cifar_dist.cli import parse_tune
from cifar_dist.exits import run_command
from cifar_dist.tune import search
from tests.cluster import trials

run_command(lambda words: search(parse_tune(words), training=trials.uneven_curve))
"""
WORDS = (
    "--dataset", "digits", "--num-samples", "10", "--max-epochs", "6", "--max-concurrent", "2",
    "--name", "s", "--no-report",
)  # fmt: skip


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start a search whose trials only report, as a command."""
    return subprocess.Popen(
        [sys.executable, "-c", SEARCH, *WORDS, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Finished:
    out, err = process.communicate(timeout=PATIENCE_S)
    return Finished(process.returncode, out, err, 0.0)


def epochs_done(search: SearchDirectory) -> int:
    """Rows that all trials have written."""
    trials = [RunDirectory(folder) for folder in search.trials_folder.glob("t*")]
    return sum(len(trial.read_metrics()) for trial in trials)


def wait_for_trials(search: SearchDirectory) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not epochs_done(search):
        assert time.monotonic() < deadline, "no trial began"
        time.sleep(0.05)


def results(search: SearchDirectory) -> pd.DataFrame:
    table = io.BytesIO((search.path / "trials.csv").read_bytes())
    return pd.read_csv(table).drop(columns=["seconds"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert finish(start(folder)).code == 0
    return results(SearchDirectory.at(str(folder / "runs"), "s"))


@pytest.mark.slow
def test_a_killed_driver_goes_on_to_the_same_table_in_an_object_store_too(
    tmp_path: Path, undisturbed: pd.DataFrame, store: str
) -> None:
    search = SearchDirectory.at(store, "s")
    killed = start(tmp_path, "--storage-path", store)
    wait_for_trials(search)
    time.sleep(random.Random(SEED).uniform(0, 3))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not search.summary_file.exists()
    assert epochs_done(search) > 0
    went_on = finish(start(tmp_path, "--resume", "--storage-path", store))
    assert (went_on.code, went_on.err) == (0, "")
    pd.testing.assert_frame_equal(results(search), undisturbed)
    assert results(search)["trial_id"].is_unique
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_search_says_how_to_go_on(tmp_path: Path, undisturbed: pd.DataFrame) -> None:
    search = SearchDirectory.at(str(tmp_path / "runs"), "s")
    interrupted = start(tmp_path)
    wait_for_trials(search)
    interrupted.send_signal(signal.SIGINT)
    done = finish(interrupted)
    assert done.code == 130
    assert done.err == ("interrupted; to resume: python -m cifar_dist.tune --name s --resume\n")
    assert search.read_summary()["status"] == "interrupted"
    assert finish(start(tmp_path, "--resume")).code == 0
    pd.testing.assert_frame_equal(results(search), undisturbed)
