"""``python -m cifar_dist.train`` as a user types it: output, files, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.cache import prepare
from cifar_dist.data.datasets import find_source
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.train import _plan
from tests.conftest import PYTHON_PATH, Finished, first_images, run_command, started_command
from tests.processes import PATIENCE_S

SMALL = ("--dataset", "digits", "--batch-size", "450", "--max-epochs", "2", "--no-report")


def one_line(finished: Finished, within_s: float = 120) -> str:
    """The one line on standard error of a command that was refused.

    It takes seconds; what waits for a cluster that never answers takes minutes, and a machine that
    others keep busy several times as long as an idle one.
    """
    assert finished.code == 2, finished
    assert finished.out == ""
    assert finished.err.count("\n") == 1, finished.err
    assert finished.err.startswith("error: ")
    assert "Traceback" not in finished.err
    assert finished.seconds < within_s
    return finished.err


def run_script(folder: Path, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -c code`` in a folder."""
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@pytest.fixture(scope="module")
def main_job(tmp_path_factory: pytest.TempPathFactory, few_digits: Path) -> tuple[Path, Finished]:
    """The main job and its folder.

    On the first 5,000 of the real images, as real files, where there are any: the README shows a
    run on all of them, which takes six minutes on two cores. Else on a few digits.
    """
    folder = tmp_path_factory.mktemp("main_job")
    real = Path(os.environ.get("CIFAR_DIST_DATA") or "none")
    (folder / "data").mkdir()
    first_images(real if real.is_dir() else few_digits, folder / "data", train=5_000, test=1_000)
    words = ["--num-workers", "2", "--max-epochs", "2", "--data-dir", "data", "--name", "first"]
    return folder, run_command(folder, *words)


def test_a_run_prints_what_matters_and_exits_0(main_job: tuple[Path, Finished]) -> None:
    folder, done = main_job
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert len(lines) < 30
    assert sum(line.startswith("epoch ") for line in lines) == 2
    run = folder / "runs" / "first"
    assert f"run {run.relative_to(folder)}" in lines
    assert f"{run.relative_to(folder)}: checkpoints/" in done.out
    assert " report.html " in done.out
    assert (run / "report.html").read_bytes().startswith(b"<!doctype html>")
    summary = json.loads((run / "summary.json").read_text())
    assert f"test accuracy {summary['test_accuracy']:.4f}" in done.out
    assert lines[-2].startswith("to train longer: python -m cifar_dist.train --name first --resume")
    assert lines[-1].startswith("next: python -m cifar_dist.evaluate runs/")
    environment = json.loads((run / "environment.json").read_text())
    assert environment["command"].endswith("--data-dir data --name first")


def test_the_main_job_learns_real_cifar10(
    main_job: tuple[Path, Finished], real_cifar10: Path
) -> None:
    folder, done = main_job
    assert "4,500 training, 500 validation, 1,000 test images" in done.out
    summary = json.loads((folder / "runs" / "first" / "summary.json").read_text())
    # Seventy steps must already beat guessing by far.
    assert summary["test_accuracy"] > 0.25


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None  # importing it raises
from cifar_dist.exits import run_command
from cifar_dist.train import main
run_command(main)
"""


@pytest.fixture(scope="module")
def run_without_ray(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run ``a`` that could not import Ray."""
    folder = tmp_path_factory.mktemp("without_ray")
    words = [*SMALL, "--num-workers", "0", "--name", "a"]
    done = run_script(folder, WITHOUT_RAY, *words)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_no_workers_need_no_ray(run_without_ray: Path) -> None:
    summary = json.loads((run_without_ray / "runs" / "a" / "summary.json").read_text())
    assert summary["status"] == "completed"


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lrr", "1"], "unknown flag --lrr: did you mean --lr?"),
        (["--lr", "-1"], "--lr -1.0: must be greater than 0"),
        (["--batch-size", "6", "--num-workers", "4"], "4 workers need at least 2 images each"),
        (["--storage-path", "/proc/runs"], "--storage-path /proc/runs: cannot be written"),
        (["--weights", "missing.safetensors"], "--weights /"),
        (["--resume", "--name", "none"], "there is no run in"),
        (["--crop-padding", "33"], "--crop-padding 33: images are 32 pixels wide; lower it"),
    ],
)
def test_bad_usage_is_refused_in_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    assert said in one_line(run_command(tmp_path, "--dataset", "digits", *words))
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_misspelt_key_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("dataset: digits\nmax_epoch: 3\n")
    said = one_line(run_command(tmp_path, "--config", "my.yaml"))
    assert "unknown setting max_epoch (in my.yaml): did you mean max_epochs?" in said


def test_gpus_that_are_not_there_are_refused(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    said = one_line(run_command(tmp_path, *SMALL, "--num-workers", "4", "--use-gpu"))
    assert re.search(
        r"--num-workers 4: needs 4 x \(1 CPU, 1 GPU\), and the cluster has \d+ CPU, 0 GPU", said
    )
    assert "omit --use-gpu" in said
    assert not list((tmp_path / "runs").iterdir())


def test_a_missing_folder_without_a_network_is_refused(tmp_path: Path, monkeypatch) -> None:
    # A proxy at a closed port of this machine stands for the missing network.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    said = one_line(run_command(tmp_path, "--data-dir", "nowhere"))
    assert f"no CIFAR-10 in {tmp_path / 'nowhere'}, and the download failed" in said
    assert "--data-dir" in said
    assert not (tmp_path / "nowhere").exists()


def test_imagenet_weights_without_a_network_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    said = one_line(run_command(tmp_path, *SMALL, "--preset", "notebook"))
    assert "--weights imagenet: cannot be downloaded" in said


def test_a_ray_cluster_that_does_not_answer_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    said = one_line(run_command(tmp_path, *SMALL))
    assert "RAY_ADDRESS 127.0.0.1:9: no Ray cluster answers" in said


def test_a_truncated_parquet_file_is_refused(tmp_path: Path, small_parquet: Path) -> None:
    file = small_parquet / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    said = one_line(run_command(tmp_path, "--data-dir", str(small_parquet)))
    assert f"{file}: is no readable Parquet file" in said


def test_a_parquet_file_without_labels_is_refused(tmp_path: Path, small_parquet: Path) -> None:
    import pyarrow.parquet as pq

    file = small_parquet / "train-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["label"]), file)
    said = one_line(run_command(tmp_path, "--data-dir", str(small_parquet)))
    assert "has columns img; needs img or image, and label" in said


def test_an_archive_with_a_wrong_md5_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-python.tar.gz").write_bytes(b"not the archive")
    assert "has MD5 " in one_line(run_command(tmp_path, "--data-dir", "data"))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    import torch

    file = tmp_path / "linear.pth"
    torch.save(torch.nn.Linear(3, 4).state_dict(), file)
    # Building the network to compare with takes torchvision, which loads while Ray starts.
    said = one_line(run_command(tmp_path, *SMALL, "--weights", file.name))
    assert f"--weights {file}: is not for --network resnet18" in said
    assert not list((tmp_path / "runs").iterdir())


def test_a_taken_name_is_refused_and_nothing_is_lost(run_without_ray: Path) -> None:
    folder, run = run_without_ray, run_without_ray / "runs" / "a"
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    said = one_line(run_command(folder, *SMALL, "--num-workers", "0", "--name", "a"))
    assert f"--name a: {run} exists" in said
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before
    said = one_line(run_command(folder, "--name", "a", "--resume", "--lr", "0.5"))
    assert "--lr 0.5: the run was started with 0.001" in said
    longer = run_command(folder, "--name", "a", "--resume", "--max-epochs", "3")
    assert longer.code == 0, longer.err
    assert [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()[1:]] == [
        "1",
        "2",
        "3",
    ]


# --- failures and interruptions --------------------------------------------------------------


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    # With workers under Ray the faults suite does it.
    words = ["--dataset", "digits", "--num-workers", "0", "--name", "cut", "--no-report"]
    running = started_command(tmp_path, *words)
    run = tmp_path / "runs" / "cut"
    deadline = time.monotonic() + PATIENCE_S
    while not list(run.glob("checkpoints/epoch-*.ckpt")):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130, err
    assert err.splitlines() == [
        "interrupted; to resume: python -m cifar_dist.train --name cut --resume"
    ]
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_gpu": True}, ", lr 0.001, TF32"),
        ({"use_gpu": True, "tf32": False}, ", lr 0.001, float32"),
        ({"use_gpu": True, "precision": "bf16-mixed"}, ", lr 0.001, bf16"),
        ({"use_gpu": True, "precision": "16-mixed"}, ", lr 0.001, fp16"),
        ({}, ", lr 0.001"),
    ],
)
def test_the_plan_says_what_a_gpu_computes_in(
    tmp_path: Path, few_digits: Path, settings: dict, said: str
) -> None:
    dataset = prepare("cifar10", find_source("cifar10", str(few_digits)))
    plan = _plan(TrainConfig(**settings), RunDirectory(tmp_path), dataset, "here")
    assert plan.lines[1].endswith(said)
