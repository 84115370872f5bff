"""Runs in which a worker hangs: who is named, what a person's Ctrl-C says, and the restart."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

import cifar_dist.cluster.trainer
from cifar_dist.cluster import progress, trainer
from cifar_dist.cluster.progress import RankProgress
from cifar_dist.config.train import TrainConfig
from cifar_dist.config.tune import make_tune_config
from cifar_dist.errors import Interrupted, UserError
from cifar_dist.events import Event, Started, Warned, WorkersLost
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.train import train
from cifar_dist.tune import search
from tests.field.trials import hanging_once
from tests.field.workers import stopped_worker


@pytest.fixture
def config(
    ray_cluster: None, tmp_path: Path, few_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> TrainConfig:
    """Of a run of two workers, one of which is stopped once."""
    monkeypatch.setenv("CIFAR_DIST_DATA", str(few_digits))
    train_on_ray = cifar_dist.cluster.trainer.train_on_ray
    monkeypatch.setattr(
        "cifar_dist.cluster.trainer.train_on_ray",
        functools.partial(train_on_ray, worker=stopped_worker),
    )
    monkeypatch.setattr(progress, "WARN_S", 5)
    return TrainConfig(
        max_epochs=2, batch_size=43, num_workers=2, report=False, storage_path=str(tmp_path),
        name="a", step_timeout="10s",
    )  # fmt: skip


@pytest.mark.slow
def test_a_worker_is_stopped_and_the_run_goes_on_without_a_person(config: TrainConfig) -> None:
    before = dict(os.environ)
    events: list[Event] = []
    trained = train(config, events.append)
    (warned,) = (each.message for each in events if isinstance(each, Warned))
    assert warned.startswith("no step has come for ")
    assert ": worker 1 is " in warned
    assert warned.endswith("; after 10 s (--step-timeout) it counts as failed")
    (lost,) = (each.message for each in events if isinstance(each, WorkersLost))
    assert ": worker 1 is " in lost
    starts = [each.checkpoint for each in events if isinstance(each, Started)]
    assert starts[0] is None
    assert str(starts[1]).endswith("epoch-0001.ckpt")
    assert (trained.summary["status"], trained.summary["restarts"]) == ("completed", 1)
    assert [row["epoch"] for row in trained.run.read_metrics()] == [1, 2]
    # In a notebook the next run must not find this one's settings of Ray.
    assert dict(os.environ) == before


@pytest.mark.slow
def test_a_worker_is_stopped_and_a_person_presses_ctrl_c(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "HUNG_STOP_TIMEOUT_S", 1)

    def interrupt(event: Event) -> None:
        if isinstance(event, Warned) and event.message.startswith("no step"):
            raise Interrupted

    with pytest.raises(Interrupted) as raised:
        train(config.replace(step_timeout="0"), interrupt)
    assert str(raised.value).startswith(
        "interrupted: worker 1 came to no step's end, so nothing was saved now; the newest "
        "checkpoint is epoch-0001.ckpt; to resume: python -m cifar_dist.train --name a --resume"
    )
    assert RunDirectory.at(str(tmp_path), "a").read_summary()["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_hangs_and_is_restarted(
    tmp_path: Path, few_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_DIST_DATA", str(few_digits))
    config = make_tune_config(
        {"num_samples": 1, "max_epochs": 1, "batch_size": 43, "report": False, "name": "s",
         "storage_path": str(tmp_path), "step_timeout": "10s", "max_failures": 1}
    )  # fmt: skip
    searched = search(config, training=hanging_once)
    assert list(searched.table["status"]) == ["completed"]
    assert (searched.directory.trial(0).path / "hung").exists()


@pytest.mark.parametrize("given", ["5", "soon", "-1"])
def test_a_step_timeout_that_would_end_healthy_runs(given: str) -> None:
    with pytest.raises(UserError, match=f"--step-timeout {given}: must be 10 seconds or more"):
        TrainConfig(step_timeout=given)


class Ranks:
    """Reports of three ranks, by a clock of their own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.progress = RankProgress(lambda: self.now)

    def report(self, *marks: int | None, usual_s: float | None = 4) -> None:
        """Pass 10 s, and report each rank's marks, but of those that are None."""
        self.now += 10
        for rank, each in enumerate(marks):
            if each is not None:
                self.progress.report("first", 3, rank, each, usual_s)

    def stall(self) -> tuple[float, tuple[int, ...], bool]:
        found = self.progress.stall()
        assert found is not None
        return found.seconds, found.ranks, found.unheard


def test_one_rank_reads_from_a_folder_that_is_gone() -> None:
    ranks = Ranks()
    assert ranks.progress.stall() is None
    for step in range(1, 6):
        ranks.report(step * 10, step * 10, step * 10)
    assert ranks.stall() == (0, (0, 1, 2), False)
    for _ in range(6):
        ranks.report(54, 53, 54)  # the others are in the backward pass
    assert ranks.stall() == (50, (1,), False)
    found = ranks.progress.stall()
    assert found is not None
    assert found.over(40)
    assert not found.over(60)


def test_one_rank_is_stopped_before_it_has_reported_anything() -> None:
    ranks = Ranks()
    for _ in range(5):
        ranks.report(2, None, 2)
    assert ranks.stall() == (40, (1,), True)


def test_steps_of_a_minute_are_no_stall() -> None:
    ranks = Ranks()
    ranks.report(4, 4, 4, usual_s=60)
    ranks.now += 550
    found = ranks.progress.stall()
    assert found is not None
    assert found.seconds == 550
    assert not found.over(60)
    ranks.now += 50
    found = ranks.progress.stall()
    assert found is not None
    assert found.over(60)


def test_reports_of_workers_that_were_replaced_come_late() -> None:
    ranks = Ranks()
    ranks.report(90, 90, 90)
    ranks.progress.forget()
    ranks.report(91, 91, 91)
    assert ranks.progress.stall() is None
    ranks.progress.report("second", 2, 0, 4, None)
    ranks.report(92, 92, 92)
    assert ranks.stall()[1] == (1,)
    ranks.progress.leave("second", 1)
    assert ranks.stall()[1] == (0,)
