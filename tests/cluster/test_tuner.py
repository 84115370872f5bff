"""Searches on a real Ray cluster, with trials that only report; real training is in other tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from cifar_dist.cluster import tuner
from cifar_dist.cluster.trials import device_lost, free_memory
from cifar_dist.cluster.tuner import RAY_FOLDER
from cifar_dist.config.tune import make_tune_config
from cifar_dist.errors import Diverged, Interrupted, RunFailed, UserError
from cifar_dist.events import Event, TrialUpdated
from cifar_dist.tune import Searched, search
from tests.cluster import trials
from tests.conftest import PYTHON_PATH
from tests.processes import PATIENCE_S

pytestmark = pytest.mark.usefixtures("ray_cluster")

SMALL = {"dataset": "digits", "num_samples": 6, "max_epochs": 4, "max_concurrent": 2,
         "report": False}  # fmt: skip


def search_small(
    folder: Path, name: str = "search", training=trials.curve, listener=lambda event: None,
    resume: bool = False, **settings,
) -> Searched:  # fmt: skip
    config = make_tune_config(
        {**SMALL, "storage_path": str(folder), "name": name, "resume": resume, **settings}
    )
    return search(config, listener, training=training)


def results(searched: Searched) -> pd.DataFrame:
    return searched.table.drop(columns=["seconds"])


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    folder = tmp_path_factory.mktemp("search")
    return search_small(folder, training=trials.with_pid, num_samples=10)


def test_a_search_ends_with_a_row_a_trial(undisturbed: Searched) -> None:
    table = undisturbed.table
    assert list(table["trial_id"]) == [f"t{number:04d}" for number in range(10)]
    assert set(table["status"]) == {"completed", "stopped"}
    assert (table[table["status"] == "completed"]["epochs"] == 4).all()
    assert (table[table["status"] == "stopped"]["epochs"] < 4).all()
    assert undisturbed.summary["status"] == "completed"
    for _, row in table.iterrows():
        expected = max(trials.accuracy(row["lr"], epoch) for epoch in range(1, row["epochs"] + 1))
        assert row["val_accuracy"] == expected
    left = {file.name for file in undisturbed.directory.path.iterdir()}
    assert left == {
        "config.yaml", "space.yaml", "trials.csv", "trials.parquet", "history.parquet",
        "best.yaml", "summary.json", "trials",
    }  # fmt: skip


def test_trials_follow_each_other_in_warm_processes(undisturbed: Searched) -> None:
    pids = {file.read_text() for file in undisturbed.directory.path.glob("trials/*/pid")}
    assert len(list(undisturbed.directory.path.glob("trials/*/pid"))) == 10
    assert len(pids) == 2


def test_how_fast_trials_run_and_how_many_at_a_time_changes_nothing(
    undisturbed: Searched, tmp_path: Path
) -> None:
    others = search_small(tmp_path, training=trials.uneven_curve, num_samples=10, max_concurrent=3)
    pd.testing.assert_frame_equal(results(others), results(undisturbed))
    # Some had reached their last epoch before what stops them was known.
    folders = [others.directory.trial(number) for number in range(len(others.table))]
    said = [folder.read_summary()["status"] for folder in folders]
    assert said == list(others.table["status"])
    assert not any(folder.checkpoints.exists() for folder in folders)


def test_a_trials_failure_is_its_row_and_the_search_goes_on(tmp_path: Path) -> None:
    searched = search_small(
        tmp_path, training=trials.faulty, scheduler="none", max_failures=1, max_epochs=2
    )
    table = searched.table
    assert list(table["status"]) == [
        "completed", "failed", "failed", "failed", "completed", "completed",
    ]  # fmt: skip
    assert table["error"][1] == "ZeroDivisionError: no trial divides by zero"
    assert table["error"][2] == "the loss of epoch 1 is nan (lr 10); lower --lr"
    assert table["error"][3].startswith("its process died 2 times: killed,")
    assert "\n" not in "".join(table["error"].dropna())
    traceback = searched.directory.trial(1).error_file.read_text()
    assert traceback.startswith("Traceback")
    assert list(table["epochs"]) == [2, 0, 0, 0, 2, 2]


def test_an_error_of_the_device_ends_the_process_and_no_other_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    start = tuner._Bookkeeper.on_trial_start

    def counted(self, iteration, trials, trial, **info) -> None:
        started.append(trial.config["number"])
        start(self, iteration, trials, trial, **info)

    monkeypatch.setattr(tuner._Bookkeeper, "on_trial_start", counted)
    searched = search_small(
        tmp_path, training=trials.on_a_device, scheduler="none", max_epochs=2, num_samples=8,
        max_concurrent=1,
    )  # fmt: skip
    table = searched.table
    assert [number for number in range(8) if table["status"][number] == "failed"] == [2, 3]
    assert set(table["status"]) == {"completed", "failed"}
    assert table["error"][2] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert sorted(started) == list(range(8))  # none was called again
    pids = [
        (searched.directory.trial(number).path / "pids").read_text().split() for number in range(8)
    ]
    assert all(len(each) == 1 for each in pids)
    # The process ended after trial 2, and not after trial 3, whose error was its own.
    (first,), (second,) = ({pid for each in some for pid in each} for some in (pids[:3], pids[3:]))
    assert first != second


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), True),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
            True,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (torch.OutOfMemoryError(OUT_OF_MEMORY), False),
        (RuntimeError("shapes cannot be multiplied (2x3 and 4x5)"), False),
        (Diverged("the loss is nan at step 3"), False),
        (ValueError("no CUDA device was asked for, and an error is no error of it"), False),
    ],
)
def test_only_errors_of_the_device_end_a_process(error: Exception, lost: bool) -> None:
    assert device_lost(error) is lost
    outer = RunFailed("a step failed")
    outer.__cause__ = error
    assert device_lost(outer) is lost


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_memory_that_ran_out_leaves_the_process_of_use() -> None:
    with pytest.raises(torch.OutOfMemoryError) as raised:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert not device_lost(raised.value)
    free_memory()
    assert torch.ones(3, device="cuda").sum().item() == 3


ASSERT_ON_THE_DEVICE = """
import torch
from cifar_dist.cluster.trials import device_lost

for attempt in (lambda: torch.ones(3, device="cuda")[torch.tensor([7], device="cuda")].sum().item(),
                lambda: torch.ones(3, device="cuda").sum().item()):
    try:
        attempt()
    except Exception as error:
        print("lost", device_lost(error))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_failed_assertion_is_an_error_of_the_device() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASSERT_ON_THE_DEVICE],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.stdout.split("\n")[:2] == ["lost True", "lost True"], done.stderr


def test_a_search_whose_trials_all_fail_fails(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="all 2 trials failed, the first with: KeyError: 'lr'"):
        search_small(tmp_path, training=_raising, num_samples=2)
    assert len(pd.read_csv(tmp_path / "search" / "trials.csv")) == 2


def _raising(work) -> None:
    raise KeyError("lr")


def test_history_is_on_disk_while_trials_run(tmp_path: Path) -> None:
    seen: list[int] = []

    def look(event: Event) -> None:
        file = tmp_path / "search" / "history.parquet"
        if isinstance(event, TrialUpdated) and event.status != "unfinished" and file.exists():
            seen.append(len(pd.read_parquet(file)))

    search_small(tmp_path, listener=look, scheduler="none", num_samples=4)
    assert any(0 < rows < 16 for rows in seen)
    assert len(pd.read_parquet(tmp_path / "search" / "history.parquet")) == 16


@pytest.mark.slow
def test_a_time_budget_leaves_trials_for_a_resume(tmp_path: Path) -> None:
    began = time.monotonic()
    cut = search_small(tmp_path, time_budget="6s", max_epochs=40, num_samples=3, scheduler="none")
    assert time.monotonic() - began < 60
    assert cut.summary["status"] == "unfinished"
    assert set(cut.table["status"]) <= {"completed", "unfinished"}
    assert cut.summary["unfinished"] > 0
    whole = search_small(tmp_path, max_epochs=40, num_samples=3, scheduler="none", resume=True)
    assert list(whole.table["status"]) == ["completed"] * 3
    assert list(whole.table["epochs"]) == [40] * 3
    assert len(pd.read_parquet(whole.directory.history_file)) == 120


def test_an_interrupted_search_goes_on_to_the_same_table(
    undisturbed: Searched, tmp_path: Path
) -> None:
    events: list[Event] = []

    def interrupt(event: Event) -> None:
        events.append(event)
        if len(events) == 14:
            raise Interrupted

    with pytest.raises(Interrupted, match="--resume"):
        search_small(tmp_path, listener=interrupt, num_samples=10)
    assert json.loads((tmp_path / "search" / "summary.json").read_text())["status"] == "interrupted"
    finished = set(_over(pd.read_csv(tmp_path / "search" / "trials.csv")))
    time.sleep(2)  # the trials of the interrupted search are told to end
    again: list[str] = []
    resumed = search_small(
        tmp_path, listener=lambda event: again.append(getattr(event, "trial_id", "")),
        num_samples=10, resume=True,
    )  # fmt: skip
    pd.testing.assert_frame_equal(results(resumed), results(undisturbed))
    assert not finished & set(again)
    assert not (tmp_path / "search" / RAY_FOLDER).exists()


def _over(table: pd.DataFrame) -> list[str]:
    return list(table[table["status"].isin(["completed", "stopped", "failed"])]["trial_id"])


def test_a_finished_search_that_is_resumed_runs_nothing(undisturbed: Searched) -> None:
    events: list[Event] = []
    folder = undisturbed.directory.path.parent
    again = search_small(folder, listener=events.append, num_samples=10, resume=True)
    assert events == []
    pd.testing.assert_frame_equal(again.table, undisturbed.table)


def test_more_samples_on_resume_add_trials(tmp_path: Path) -> None:
    few = search_small(tmp_path, num_samples=2, max_epochs=1)
    more = search_small(tmp_path, num_samples=4, max_epochs=1, resume=True)
    pd.testing.assert_frame_equal(more.table[:2], few.table)
    assert list(more.table["status"]) == ["completed"] * 4


def test_a_grid_is_searched_whole(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text("lr: {grid: [0.001, 0.01]}\nstep_size: {choice: [3, 5]}\n")
    searched = search_small(
        tmp_path, space=str(file), search="grid", scheduler="none", max_epochs=1, metric="val_loss"
    )
    pairs = list(zip(searched.table["lr"], searched.table["step_size"], strict=True))
    assert pairs == [(0.001, 3), (0.001, 5), (0.01, 3), (0.01, 5)]
    assert searched.summary["best_trial"] in ("t0000", "t0001")


def test_optuna_learns_where_the_good_values_are(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("lr: {loguniform: [1e-5, 1]}\noptimizer: {choice: [sgd, adamw]}\n")
    settings = {"space": str(file), "search": "optuna", "scheduler": "none", "max_epochs": 1}
    first = search_small(tmp_path, num_samples=12, **settings)
    assert list(first.table["status"]) == ["completed"] * 12
    more = search_small(tmp_path, num_samples=24, resume=True, **settings)
    pd.testing.assert_frame_equal(more.table[:12], first.table)
    # Random draws lie between 0.0001 and 0.01 in two of five cases.
    assert more.table["lr"][12:].between(1e-4, 1e-2).sum() >= 7


def test_what_the_cluster_can_never_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--workers-per-trial 5: needs 5 x .*room for 4; use --wor"
    ):
        search_small(tmp_path, workers_per_trial=5)
    with pytest.raises(UserError, match="ask for less with --cpus-per-trial"):
        search_small(tmp_path, cpus_per_trial=9)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_size_that_no_trial_could_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("batch_size: {choice: [8]}\n")
    with pytest.raises(UserError, match="--batch-size 8: the smallest batch of 1350 images has 6"):
        search_small(tmp_path, space=str(file), workers_per_trial=4)


def test_no_trial_is_left_running(undisturbed: Searched) -> None:
    import ray
    from ray.util import placement_group_table

    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        groups = [each for each in placement_group_table().values() if each["state"] != "REMOVED"]
        if not groups and ray.available_resources().get("CPU") == 4:
            break
        time.sleep(0.5)
    assert groups == []
    assert ray.available_resources()["CPU"] == 4
    assert threading.active_count() < 50
