"""Files that are written beside training."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from cifar_dist.errors import Interrupted, RunFailed
from cifar_dist.events import Event, StepDone
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.training import checkpointing
from cifar_dist.training.checkpoints import read_checkpoint
from cifar_dist.training.writer import BackgroundWriter, Snapshot
from tests.processes import PATIENCE_S
from tests.training.small import STEPS, SignalAt, Small, TrainFew, same, small_network


@pytest.fixture(autouse=True, scope="module")
def _small():
    with small_network(Small):
        yield


def test_jobs_run_one_at_a_time_in_their_order() -> None:
    done: list[int] = []
    release = threading.Event()
    with BackgroundWriter() as writer:
        writer.submit(lambda: (release.wait(PATIENCE_S), done.append(1)))
        assert done == []  # submit does not wait for the job itself
        release.set()
        writer.submit(lambda: done.append(2))
        assert done[0] == 1
        writer.wait()
        assert done == [1, 2]


def test_what_a_job_raises_is_raised_by_the_next_and_once() -> None:
    def fail() -> None:
        raise RunFailed("no room")

    with BackgroundWriter() as writer:
        writer.submit(fail)
        with pytest.raises(RunFailed, match="no room"):
            writer.submit(lambda: pytest.fail("started after one that failed"))
        writer.wait()


def test_the_end_waits_for_the_last_job_and_keeps_the_first_error() -> None:
    done: list[str] = []

    def fail() -> None:
        done.append("tried")
        raise RunFailed("no room")

    def interrupted() -> None:
        with BackgroundWriter() as writer:
            writer.submit(fail)
            raise Interrupted

    with pytest.raises(Interrupted):
        interrupted()
    assert done == ["tried"]
    with pytest.raises(RunFailed), BackgroundWriter() as writer:
        writer.submit(fail)


def test_a_snapshot_is_what_was_there_when_it_was_taken() -> None:
    weight = torch.ones(3)
    content = {"state": OrderedDict(weight=weight), "rows": [{"epoch": 1}], "pair": (weight, 2)}
    snapshot = Snapshot(content)
    weight.add_(1)
    content["rows"].append({"epoch": 2})
    content["rows"][0]["epoch"] = 7
    found = snapshot.on_cpu()
    assert found["state"]["weight"].tolist() == found["pair"][0].tolist() == [1, 1, 1]
    assert found["rows"] == [{"epoch": 1}]
    assert isinstance(found["state"], OrderedDict)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_snapshot_does_not_change_with_what_is_trained_on() -> None:
    weight = torch.zeros(10_000_000, device="cuda")
    snapshot = Snapshot({"weight": weight})
    for _ in range(100):
        weight.add_(1)
    found = snapshot.on_cpu()["weight"]
    assert found.device.type == "cpu"
    assert found.count_nonzero() == 0


def test_training_continues_while_a_checkpoint_is_written(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    went_on = threading.Event()
    as_bytes = checkpointing.checkpoint_as_bytes

    def slow(content):
        assert went_on.wait(PATIENCE_S), "training waited for its checkpoint"
        return as_bytes(content)

    monkeypatch.setattr(checkpointing, "checkpoint_as_bytes", slow)

    def listen(event: Event) -> None:
        # The second epoch's third step comes while the first epoch's checkpoint is written.
        if isinstance(event, StepDone) and (event.epoch, event.step) == (2, 3):
            went_on.set()

    trained = train_few(tmp_path, "beside", listen)
    assert went_on.is_set()
    run = RunDirectory.at(str(tmp_path), "beside")
    newest = run.checkpoints_newest_first()[0]
    assert newest == run.checkpoint(3)
    assert len(read_checkpoint(newest)["callbacks"]["MetricsHistory"]["history"]) == 3
    assert trained.summary["status"] == "completed"


def test_a_checkpoint_holds_the_step_that_it_is_named_after(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train_few(tmp_path, "undisturbed")
    as_bytes = checkpointing.checkpoint_as_bytes
    steps = threading.Semaphore(0)

    def late(content):
        # Written two steps later, when weights, statistics and averages have all moved.
        for _ in range(2):
            steps.acquire(timeout=1)
        return as_bytes(content)

    def die(event: Event) -> None:
        if isinstance(event, StepDone):
            steps.release()
            if (event.epoch, event.step) == (2, 5):
                raise Interrupted

    monkeypatch.setattr(checkpointing, "checkpoint_as_bytes", late)
    with pytest.raises(Interrupted):
        train_few(tmp_path, "cut", die, checkpoint_every=f"{STEPS + 2}s")
    run = RunDirectory.at(str(tmp_path), "cut")
    assert run.checkpoints_newest_first()[0] == run.checkpoint(2, 2)
    same(train_few(tmp_path, "cut", resume=True), undisturbed)


def test_an_interruption_waits_for_its_checkpoint(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_bytes = checkpointing.checkpoint_as_bytes
    written: list[int] = []

    def slow(content):
        threading.Event().wait(0.3)
        written.append(content["global_step"])
        return as_bytes(content)

    monkeypatch.setattr(checkpointing, "checkpoint_as_bytes", slow)
    with pytest.raises(Interrupted):
        train_few(tmp_path, "cut", SignalAt(2, 2))
    assert written[-1] == STEPS + 2
    run = RunDirectory.at(str(tmp_path), "cut")
    assert run.checkpoints_newest_first()[0] == run.checkpoint(2, 2)


def test_a_file_that_cannot_be_written_ends_the_run_one_checkpoint_later(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_bytes = checkpointing.checkpoint_as_bytes

    def second_fails(content):
        if content["global_step"] == 2 * STEPS:
            raise RunFailed("epoch-0002.ckpt: cannot be written (No space left on device)")
        return as_bytes(content)

    monkeypatch.setattr(checkpointing, "checkpoint_as_bytes", second_fails)
    with pytest.raises(RunFailed, match="No space left on device"):
        train_few(tmp_path, "full", max_epochs=5)
    run = RunDirectory.at(str(tmp_path), "full")
    assert run.checkpoints_newest_first() == [run.checkpoint(1)]
    assert [row["epoch"] for row in run.read_metrics()] == [1]
    assert run.read_summary()["status"] == "failed"
