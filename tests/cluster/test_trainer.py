"""Real runs on a real Ray cluster, with workers on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.util import placement_group_table

import cifar_dist.cluster.trainer
from cifar_dist.cluster.ray_internals import SHUTDOWN_TIMEOUT_S
from cifar_dist.config.train import TrainConfig
from cifar_dist.config.tune import make_tune_config
from cifar_dist.data.cache import CachedDataset, prepare
from cifar_dist.data.datamodule import ImageDataModule
from cifar_dist.data.datasets import find_source
from cifar_dist.errors import RunFailed, UserError
from cifar_dist.events import Event, Plan, Started
from cifar_dist.exits import run_command
from cifar_dist.inference.model import TrainedModel, load_trained
from cifar_dist.inference.predictions import Predictions
from cifar_dist.inference.sharded import shard_logits
from cifar_dist.model.weights import read_weights
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.train import Trained, main, train
from cifar_dist.tune import search
from tests.cluster import workers
from tests.conftest import NEEDS_RAY_INTERNALS
from tests.processes import PATIENCE_S, descendants
from tests.training.test_fit import without_timing

pytestmark = pytest.mark.usefixtures("ray_cluster")

SMALL = {"max_epochs": 2, "batch_size": 43, "num_workers": 2, "report": False}


@pytest.fixture(scope="module", autouse=True)
def _on_few_digits(few_digits: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_DIST_DATA", str(few_digits))
        yield


def train_small(folder: Path, name: str, events: list | None = None, **settings) -> Trained:
    config = TrainConfig(**{**SMALL, "storage_path": str(folder), "name": name, **settings})
    return train(config, (events if events is not None else []).append)


@pytest.fixture
def with_worker(monkeypatch: pytest.MonkeyPatch):
    """Makes workers do something else than only train."""
    train_on_ray = cifar_dist.cluster.trainer.train_on_ray

    def use(worker) -> None:
        monkeypatch.setattr(
            "cifar_dist.cluster.trainer.train_on_ray",
            functools.partial(train_on_ray, worker=worker),
        )

    return use


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, _on_few_digits: None, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    return train_small(tmp_path_factory.mktemp("runs"), "undisturbed")


def test_a_run_of_two_workers_is_complete(undisturbed: Trained) -> None:
    rows = undisturbed.run.read_metrics()
    assert [row["world_size"] for row in rows] == [2, 2]
    assert [row["step"] for row in rows] == [4, 8]
    assert [row["samples"] for row in rows] == [144, 288]
    assert undisturbed.outcome.test_images == 40
    assert (undisturbed.summary["status"], undisturbed.summary["restarts"]) == ("completed", 0)
    left = {file.name for file in undisturbed.run.path.iterdir()}
    assert left == {
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "checkpoints",
        "model.safetensors",
        "summary.json",
        "test-predictions.safetensors",
    }


def recorded(run: RunDirectory, world_size: int) -> dict[tuple, list[tuple]]:
    """By (stage, epoch, global batch): label and digest of each image, in rank order."""
    images = defaultdict(list)
    for rank in range(world_size):
        for line in (run.path / f"images-{rank}.txt").read_text().splitlines():
            stage, epoch, batch, said_rank, _, label, digest = line.split()
            assert int(said_rank) == rank
            images[stage, int(epoch), int(batch)].append((int(label), digest))
    return images


def of_one_process(config: TrainConfig) -> dict[str, list[list[tuple]]]:
    """Label and digest of each image by stage and batch, as one process without Ray has them."""
    assert config.data_dir is not None
    images = ImageDataModule(config, prepare("cifar10", find_source("cifar10", config.data_dir)))
    loader = images.train_dataloader()
    training = [
        batch
        for epoch in range(2)
        for batch in dataclasses.replace(loader, epoch=lambda e=epoch: e)
    ]
    stages = {
        "train": training,
        "validate": list(images.val_dataloader()),
        "test": list(images.test_dataloader()),
    }
    return {
        stage: [
            [
                (int(label), hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest())
                for image, label in zip(ready.images, ready.labels, strict=True)
            ]
            for ready in map(images.ready, batches)
        ]
        for stage, batches in stages.items()
    }


def of_run(run: RunDirectory) -> tuple[TrainedModel, CachedDataset]:
    config = run.read_config()
    dataset = prepare("cifar10", find_source("cifar10", str(config.data_dir)))
    weights = read_weights(str(run.model_file))
    return load_trained("weights", weights, config, dataset.about), dataset


@pytest.mark.slow
def test_three_workers_see_the_global_batches_of_one_and_a_killed_one_changes_no_bit(
    tmp_path: Path, with_worker
) -> None:
    world_size = 3
    with_worker(workers.recording_worker)
    settings = {"num_workers": world_size, "cutout": 8, "batch_size": 26}
    trained = train_small(tmp_path, "recorded", **settings)
    expected = of_one_process(TrainConfig(**{**SMALL, **settings}))
    images = recorded(trained.run, world_size)
    training = {key: seen for key, seen in images.items() if key[0] == "train"}
    assert [training[key] for key in sorted(training)] == expected["train"]
    assert len(expected["train"]) == len({repr(batch) for batch in expected["train"]}) == 2 * 6
    for stage, count in (("validate", 16), ("test", 40)):
        # No batch of 16, 26 or 14 images divides by 3 workers.
        once = sorted(image for batch in expected[stage] for image in batch)
        assert len(once) == count
        for epoch in {epoch for each, epoch, _ in images if each == stage}:
            counted = sorted(
                image
                for (s, e, _), seen in images.items()
                for image in seen
                if (s, e) == (stage, epoch) and image[0] >= 0
            )
            assert counted == once
    assert trained.outcome.test_images == 40
    kept = Predictions.from_bytes(trained.run.predictions_file.read_bytes())
    model, dataset = of_run(trained.run)
    alone = shard_logits(model, dataset, "test", 40)
    np.testing.assert_allclose(kept.logits, alone, rtol=1e-4, atol=1e-4)
    assert np.array_equal(kept.labels, dataset.open()[1].labels)
    assert [row["samples"] for row in trained.run.read_metrics()] == [144, 288]
    assert [row["world_size"] for row in trained.run.read_metrics()] == [world_size] * 2
    a_killed_worker_of_three_changes_no_bit(tmp_path, with_worker, trained, settings)


def a_killed_worker_of_three_changes_no_bit(
    tmp_path: Path, with_worker, undisturbed: Trained, settings: dict
) -> None:
    # With two, sums over workers come out the same in either order; with three, DDP's buckets
    # must be those of an undisturbed run in the first step after the restart too.
    with_worker(workers.killed_worker)
    events: list[Event] = []
    killed = train_small(
        tmp_path, "killed", events, max_failures=1, checkpoint_every="4s", **settings
    )
    assert killed.summary["restarts"] == 1
    starts = [event for event in events if isinstance(event, Started)]
    assert starts[0].checkpoint is None
    assert starts[1].checkpoint.endswith("epoch-0001-step-0004.ckpt")
    assert without_timing(killed.run) == without_timing(undisturbed.run)
    assert killed.outcome.weights_sha256 == undisturbed.outcome.weights_sha256


@pytest.mark.slow
def test_a_rerun_as_a_trial_of_several_workers_gives_the_same_bits(
    undisturbed: Trained, tmp_path: Path
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("lr: {grid: [0.001, 0.5]}\n")
    settings = {key: value for key, value in SMALL.items() if key != "num_workers"}
    config = make_tune_config(
        {**settings, "space": str(space), "search": "grid", "workers_per_trial": 2,
         "storage_path": str(tmp_path), "name": "search"}
    )  # fmt: skip
    searched = search(config)
    assert list(searched.table["status"]) == ["completed", "stopped"]
    trial = searched.directory.trial(0)
    assert without_timing(trial) == without_timing(undisturbed.run)
    assert trial.read_summary()["weights_sha256"] == undisturbed.outcome.weights_sha256
    assert searched.directory.trial(1).read_summary()["status"] == "stopped"
    deadline = time.monotonic() + PATIENCE_S
    while _left_over() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert _left_over() == []


def _left_over() -> list[str]:
    """Placement groups, reserved CPUs and processes of Ray Train that are still there."""
    table = placement_group_table()
    groups = [name for name, group in table.items() if group["state"] != "REMOVED"]
    busy = ["CPUs"] if ray.available_resources().get("CPU") != 4 else []
    titles = [title for title in descendants().values() if "ray::" in title]
    train = ("TrainController", "RayTrainWorker", "PlacementGroupCleaner", "SeveralWorkers")
    return [*groups, *busy, *(title for title in titles if any(name in title for name in train))]


def test_a_worker_that_raises_is_shown_once_and_exits_1(
    tmp_path: Path, with_worker, capfd: pytest.CaptureFixture[str], monkeypatch
) -> None:
    with_worker(workers.raising_worker)
    words = ["--num-workers", "2", "--max-failures", "0", "--name", "raised"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train", *words])
    monkeypatch.setattr("cifar_dist.exits.interrupt_on_signals", lambda: None)
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 1
    said = capfd.readouterr().err
    assert said.count("the second worker divides by zero") == 2  # source line and message
    assert said.count("Traceback") == 1
    assert "worker 1: Traceback" in said
    assert "to resume: python -m cifar_dist.train --name raised --resume" in said
    assert RunDirectory.at("runs", "raised").read_summary()["status"] == "failed"


def test_what_a_worker_finds_wrong_with_the_data_is_the_users_to_mend(
    tmp_path, with_worker
) -> None:
    with_worker(workers.misled_worker)
    events: list[Event] = []
    with pytest.raises(UserError, match="holds other data"):
        train_small(tmp_path, "misled", events, max_failures=0)
    assert [type(event) for event in events] == [Plan]
    assert not (tmp_path / "misled").exists()


@NEEDS_RAY_INTERNALS
@pytest.mark.slow
def test_a_rank_that_raises_ends_the_run_though_others_are_in_a_collective(
    tmp_path: Path, with_worker
) -> None:
    with_worker(workers.hanging_worker)
    with pytest.raises(RunFailed, match="the second worker divides by zero"):
        train_small(tmp_path, "hanging", max_failures=0)
    seconds = time.time() - (tmp_path / "hanging" / "raised").stat().st_mtime
    assert seconds < SHUTDOWN_TIMEOUT_S
    assert not (tmp_path / "hanging" / "destroyed").exists()


@pytest.mark.slow
def test_workers_that_end_well_leave_their_process_group(tmp_path: Path, with_worker) -> None:
    with_worker(workers.leaving_worker)
    trained = train_small(tmp_path, "leaving", max_epochs=1)
    assert sorted(file.name for file in trained.run.path.glob("left-*")) == ["left-0", "left-1"]


def test_more_than_the_cluster_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs 5 x \(1 CPU\).*room for 4; use --num-workers 4"):
        train_small(tmp_path, "many", num_workers=5)
    # Whatever the machine has: the tests' cluster is started with no GPU.
    assert not ray.cluster_resources().get("GPU")
    with pytest.raises(UserError, match="omit --use-gpu"):
        train_small(tmp_path, "gpu", use_gpu=True)
    assert list(tmp_path.iterdir()) == []
