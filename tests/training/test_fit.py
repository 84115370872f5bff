"""A worker's whole part, alone and without Ray: the same bits again, resumed too."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.cache import prepare
from cifar_dist.data.datasets import find_source
from cifar_dist.errors import Interrupted, UserError
from cifar_dist.events import EpochDone, Event, Plan, Started, StepDone, Warned
from cifar_dist.model.resnet import resnet18
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.runs.metrics import METRICS, TIMING_METRICS, Outcome
from cifar_dist.train import Trained, train
from cifar_dist.training.checkpoints import (
    IDENTITY,
    BadCheckpoint,
    _check_same,
    checkpoint_as_bytes,
    read_checkpoint,
)

SMALL = {"num_workers": 0, "max_epochs": 3, "batch_size": 48, "flip": 0.0, "report": False}


def train_small(folder: Path, name: str, listener=lambda event: None, **settings) -> Trained:
    config = TrainConfig(**{**SMALL, "storage_path": str(folder), "name": name, **settings})
    return train(config, listener)


@pytest.fixture(autouse=True, scope="module")
def _on_few_digits(few_digits: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_DIST_DATA", str(few_digits))
        yield


def without_timing(run: RunDirectory) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name not in TIMING_METRICS}
        for row in run.read_metrics()
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_small(tmp_path_factory.mktemp("runs"), "undisturbed")


def test_the_run_directory_is_complete(undisturbed: Trained) -> None:
    run = undisturbed.run
    assert {file.name for file in run.path.iterdir()} == {
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "checkpoints",
        "model.safetensors",
        "summary.json",
        "test-predictions.safetensors",
    }
    rows = run.read_metrics()
    assert tuple(rows[0]) == METRICS
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in rows] == [3, 6, 9]
    assert [row["samples"] for row in rows] == [144, 288, 432]
    assert {row["world_size"] for row in rows} == {1}
    summary = run.read_summary()
    assert summary == undisturbed.summary
    assert (summary["status"], summary["epochs"], summary["restarts"]) == ("completed", 3, 0)
    best = max(rows, key=lambda row: row["val_accuracy"])
    assert (summary["best_epoch"], summary["val_accuracy"]) == (best["epoch"], best["val_accuracy"])
    assert undisturbed.outcome.test_images == 40
    environment = json.loads(run.environment_file.read_text())
    assert environment["torch"] == torch.__version__.split("+")[0]
    assert len(environment["dataset_fingerprint"]) == 64


def test_model_file_holds_the_best_epochs_weights(undisturbed: Trained) -> None:
    network = resnet18(10)
    network.load_state_dict(load_file(undisturbed.run.model_file))
    dataset = prepare("cifar10", find_source("cifar10", os.environ["CIFAR_DIST_DATA"]))
    _, test = dataset.open()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (dataset.mean, dataset.std))
    images = (torch.from_numpy(test.images).float() / 255 - mean) / std
    with torch.no_grad():
        right = network.eval()(images).argmax(1) == torch.from_numpy(test.labels)
    assert right.float().mean().item() == pytest.approx(
        undisturbed.summary["test_accuracy"], abs=1e-6
    )


def test_newest_two_and_best_checkpoints_are_kept(undisturbed: Trained) -> None:
    best = undisturbed.outcome.best_epoch
    kept = {file.name for file in undisturbed.run.checkpoints.iterdir()}
    assert kept == {f"epoch-{epoch:04d}.ckpt" for epoch in (best, 2, 3)}


def test_weights_sha256_is_of_the_last_epochs_weights(undisturbed: Trained) -> None:
    checkpoint = torch.load(undisturbed.run.checkpoint(3), weights_only=True)
    prefix = "network."
    state = {
        name.removeprefix(prefix): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    from safetensors.torch import save

    assert hashlib.sha256(save(state)).hexdigest() == undisturbed.summary["weights_sha256"]


def test_train_rerun_gives_the_same_bits(undisturbed: Trained, tmp_path: Path) -> None:
    again = train_small(tmp_path, "again")
    assert without_timing(again.run) == without_timing(undisturbed.run)
    assert again.outcome.weights_sha256 == undisturbed.outcome.weights_sha256
    assert again.summary["test_loss"] == undisturbed.summary["test_loss"]


def test_another_seed_gives_other_bits(undisturbed: Trained, tmp_path: Path) -> None:
    other = train_small(tmp_path, "other", seed=1, max_epochs=1)
    assert without_timing(other.run)[0] != without_timing(undisturbed.run)[0]


def test_config_yaml_gives_the_same_run(undisturbed: Trained, tmp_path: Path) -> None:
    from cifar_dist.cli import parse_train

    words = ["--config", str(undisturbed.run.config_file), "--storage-path"]
    again = train(parse_train([*words, str(tmp_path)]))
    assert again.outcome.weights_sha256 == undisturbed.outcome.weights_sha256


class Stop:
    """A listener that interrupts at an event of an epoch."""

    def __init__(self, kind: type[StepDone | EpochDone], epoch: int) -> None:
        self.kind, self.epoch = kind, epoch

    def __call__(self, event: Event) -> None:
        if not isinstance(event, self.kind):
            return
        if (event.row["epoch"] if isinstance(event, EpochDone) else event.epoch) == self.epoch:
            raise Interrupted


@pytest.mark.parametrize(
    ("kind", "epoch", "checkpoint_every"),
    [(EpochDone, 1, 2), (StepDone, 2, 1)],  # more of it, in steps, in test_resume.py
)
def test_train_resume_gives_the_same_bits(
    undisturbed: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[StepDone | EpochDone],
    epoch: int,
    checkpoint_every: int,
) -> None:
    monkeypatch.setattr("cifar_dist.training.callbacks.SECONDS_BETWEEN_STEP_EVENTS", 0)
    every = {"checkpoint_every": checkpoint_every}
    with pytest.raises(Interrupted, match=r"to resume: python -m .* --name cut --resume"):
        train_small(tmp_path, "cut", Stop(kind, epoch), **every)
    run = RunDirectory.at(str(tmp_path), "cut")
    assert run.read_summary()["status"] == "interrupted"
    resumed = train_small(tmp_path, "cut", resume=True, **every)
    assert without_timing(resumed.run) == without_timing(undisturbed.run)
    assert resumed.outcome.weights_sha256 == undisturbed.outcome.weights_sha256
    assert resumed.summary["test_accuracy"] == undisturbed.summary["test_accuracy"]
    assert resumed.summary["status"] == "completed"


def test_a_longer_run_is_the_shorter_one_continued(undisturbed: Trained, tmp_path: Path) -> None:
    train_small(tmp_path, "short", max_epochs=2)
    longer = train_small(tmp_path, "short", resume=True)
    assert longer.outcome.weights_sha256 == undisturbed.outcome.weights_sha256


def test_resuming_a_completed_run_trains_nothing_and_agrees(undisturbed, tmp_path: Path) -> None:
    done = train_small(tmp_path, "done")
    events: list[Event] = []
    again = train_small(tmp_path, "done", events.append, resume=True)
    assert not any(isinstance(event, EpochDone) for event in events)
    assert again.outcome == done.outcome


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd", "schedule": "onecycle", "lr": 0.05},
        {"precision": "bf16-mixed", "channels_last": True},
        {"stem": "cifar", "image_size": 16, "label_smoothing": 0.1, "cutout": 8},
    ],
)
def test_other_settings_train_and_resume_alike(tmp_path: Path, settings: dict) -> None:
    whole = train_small(tmp_path, "whole", max_epochs=2, **settings)
    with pytest.raises(Interrupted):
        train_small(tmp_path, "cut", Stop(EpochDone, 1), max_epochs=2, **settings)
    resumed = train_small(tmp_path, "cut", resume=True, max_epochs=2, **settings)
    assert resumed.outcome.weights_sha256 == whole.outcome.weights_sha256
    losses = [row["train_loss"] for row in whole.outcome.history]
    assert losses[1] < losses[0]


def test_a_checkpoint_of_before_a_setting_counts_as_having_its_default(
    undisturbed: Trained, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train_small(tmp_path, "old", Stop(EpochDone, 2))
    run = RunDirectory.at(str(tmp_path), "old")
    files = run.checkpoints_newest_first()
    for file in files:
        content = read_checkpoint(file)
        assert content[IDENTITY].pop("tf32") is True
        file.write_bytes(checkpoint_as_bytes(content))
    settings = run.config_file.read_text()
    run.config_file.write_text(settings.replace("tf32: true\n", ""))
    heard: list[Event] = []
    resumed = train_small(tmp_path, "old", heard.append, resume=True)
    assert heard[1] == Started(1, str(files[0]))
    assert not any(isinstance(event, Warned) for event in heard)
    assert resumed.outcome.weights_sha256 == undisturbed.outcome.weights_sha256


def test_a_setting_that_a_checkpoint_lacks_is_still_compared(tmp_path: Path) -> None:
    identity = TrainConfig(tf32=False).computes()
    old = {"state_dict": {}, IDENTITY: TrainConfig().computes()}
    del old[IDENTITY]["tf32"]
    with pytest.raises(BadCheckpoint, match="is of another run: tf32 True, here False"):
        _check_same(old, identity, {})


def test_a_batch_of_another_size_does_not_slow_down_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.training.small import Small, small_network  # which imports this module

    graphs: list[tuple[int, bool]] = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        tensors = [each for each in inputs if isinstance(each, torch.Tensor)]
        images = next(each for each in tensors if each.dim() == 4 and each.shape[-1] == 32)
        any_size = any(isinstance(each, torch.SymInt) for each in inputs)
        graphs.append((int(images.shape[0]), any_size))
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *w, **named: compile_(*w, **named, backend=count))
    torch._dynamo.reset()
    with small_network(Small):
        train_small(tmp_path, "compiled", compile=True, max_epochs=2, batch_size=50)
    assert not any(any_size for _, any_size in graphs), graphs
    # 144 images to train on make batches of 50, 50 and 44; 16 to validate, 40 to test.
    assert sorted({size for size, _ in graphs}) == [16, 40, 44, 50]


def test_resume_refuses_other_data(small_parquet: Path, tmp_path: Path) -> None:
    from tests.conftest import write_parquet

    settings = {"data_dir": str(small_parquet), "batch_size": 27}
    train_small(tmp_path, "a", max_epochs=1, **settings)
    images = np.random.default_rng(1).integers(0, 256, (60, 32, 32, 3), np.uint8)
    write_parquet(small_parquet / "train-00000-of-00001.parquet", images, np.arange(60) % 10)
    with pytest.raises(UserError, match="other data than the run was started with"):
        train_small(tmp_path, "a", resume=True, max_epochs=2, **settings)
    assert (tmp_path / "a" / "checkpoints" / "epoch-0001.ckpt").exists()


def test_starting_weights_are_used(undisturbed: Trained, tmp_path: Path) -> None:
    tuned = train_small(
        tmp_path, "tuned", weights=str(undisturbed.run.model_file), max_epochs=1, lr=1e-5
    )
    assert tuned.outcome.history[0]["train_loss"] < undisturbed.outcome.history[1]["train_loss"]


def test_events_come_in_the_order_of_what_happens(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("cifar_dist.training.callbacks.SECONDS_BETWEEN_STEP_EVENTS", 0)
    events: list[Event] = []
    trained = train_small(tmp_path, "heard", events.append, max_epochs=1)
    assert [type(event) for event in events] == [Plan, Started, *[StepDone] * 3, EpochDone]
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [event.step for event in steps] == [1, 2, 3]
    assert all(event.images_per_second > 0 for event in steps)
    assert 0 <= steps[0].accuracy <= 1
    row = events[-1].row
    assert row == trained.run.read_metrics()[0]
    # The steps' losses are means over images: weighted by batch they give the epoch's.
    mean = sum(event.loss for event in steps) / 3
    assert mean == pytest.approx(row["train_loss"], rel=1e-5)


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--weights .*missing.pth"):
        train_small(tmp_path, "a", weights=str(tmp_path / "missing.pth"))
    assert list(tmp_path.iterdir()) == []


def test_the_outcome_survives_pickling_without_torch(undisturbed: Trained) -> None:
    import pickle
    import subprocess
    import sys

    code = (
        "import sys, pickle; outcome = pickle.loads(sys.stdin.buffer.read()); "
        "assert 'torch' not in sys.modules; print(outcome.weights_sha256)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(undisturbed.outcome),
        capture_output=True,
        check=True,
    )
    assert isinstance(undisturbed.outcome, Outcome)
    assert done.stdout.decode().strip() == undisturbed.outcome.weights_sha256
