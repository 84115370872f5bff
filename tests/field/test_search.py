"""Searches that people had trouble with: dead trials, edited spaces, NaN, full disks."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from cifar_dist.cli import parse_tune
from cifar_dist.config.files import read_settings
from cifar_dist.config.tune import TuneConfig, make_tune_config
from cifar_dist.errors import RunFailed, UserError
from cifar_dist.events import Event, SearchPlan, Warned
from cifar_dist.reports.write import write_report
from cifar_dist.runs.metrics import METRICS
from cifar_dist.search.directory import SearchDirectory
from cifar_dist.search.space import read_space, searched_space
from cifar_dist.search.suggestions import Optuna
from cifar_dist.search.trials import TrialTable
from cifar_dist.terminal.search import SearchDisplay, ranking
from cifar_dist.tune import Searched, _results, search
from tests.cluster.trials import curve
from tests.field import trials

SMALL = {"dataset": "digits", "num_samples": 3, "max_epochs": 2, "max_concurrent": 2,
         "report": False, "scheduler": "none", "name": "s"}  # fmt: skip


def small(folder: Path, **settings) -> TuneConfig:
    return make_tune_config({**SMALL, "storage_path": str(folder), **settings})


def epochs_of(searched: Searched) -> dict[str, list[int]]:
    history = pd.read_parquet(searched.directory.history_file)
    return {str(trial): list(rows["epoch"]) for trial, rows in history.groupby("trial_id")}


# --- a trial's process that dies ---------------------------------------------------------------


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("scheduler", ["none", pytest.param("asha", marks=pytest.mark.slow)])
def test_a_trial_dies_between_its_checkpoint_and_its_report(tmp_path: Path, scheduler: str) -> None:
    config = small(
        tmp_path, num_samples=2, max_epochs=4, metric="val_loss", grace_period=2,
        scheduler=scheduler,
    )  # fmt: skip
    searched = search(config, training=trials.dying_before_a_report)
    assert list(searched.table["status"]) == ["completed", "completed"]
    assert epochs_of(searched) == {"t0000": [1, 2, 3, 4], "t0001": [1, 2, 3, 4]}
    assert searched.summary["epochs_run"] == 8


# --- an edited space ---------------------------------------------------------------------------

SPACE = "lr: {choice: [0.1, 0.01]}\ngamma: {uniform: [0.1, 0.9]}\n"


@pytest.fixture
def begun(tmp_path: Path) -> Callable[..., TuneConfig]:
    """A search that has begun; called, returns what resumes it."""
    (tmp_path / "my.yaml").write_text(SPACE)
    config = small(tmp_path, space=str(tmp_path / "my.yaml"))
    SearchDirectory.create(config, searched_space(config))

    def resumed(*words: str) -> TuneConfig:
        return parse_tune(["--name", "s", "--storage-path", str(tmp_path), "--resume", *words])

    return resumed


@pytest.mark.parametrize(
    ("edited", "changed"),
    [
        (SPACE.replace("0.01", "0.001"), "lr"),
        (SPACE.replace("uniform", "loguniform"), "gamma"),
        (SPACE + "step_size: {choice: [3, 5]}\n", "step_size"),
        (SPACE.splitlines()[0], "gamma"),
    ],
)
def test_the_space_is_edited_before_a_resume(
    begun: Callable[..., TuneConfig], tmp_path: Path, edited: str, changed: str
) -> None:
    (tmp_path / "my.yaml").write_text(edited)
    with pytest.raises(UserError, match=rf"my.yaml: is not what .* with: {changed} changed, and"):
        SearchDirectory.existing(begun())
    # What the message says to do.
    own = str(tmp_path / "s" / "space.yaml")
    assert SearchDirectory.existing(begun("--space", own)).read_space().domains["lr"].values == (
        0.1, 0.01,
    )  # fmt: skip


def test_the_space_is_moved_or_deleted_or_only_its_order_changed(
    begun: Callable[..., TuneConfig], tmp_path: Path
) -> None:
    file, moved = tmp_path / "my.yaml", tmp_path / "moved.yaml"
    file.rename(moved)
    SearchDirectory.existing(begun())
    SearchDirectory.existing(begun("--space", str(moved)))
    file.write_text("# the same\n" + "\n".join(reversed(SPACE.splitlines())))
    SearchDirectory.existing(begun())
    with pytest.raises(UserError, match=r"--space /none.yaml: cannot be read"):
        SearchDirectory.existing(begun("--space", "/none.yaml"))


def test_an_installed_space_is_changed_by_an_update(tmp_path: Path) -> None:
    config = small(tmp_path)
    directory = SearchDirectory.create(config, searched_space(config))
    directory.space_file.write_text(directory.space_file.read_text().replace("0.9", "0.8"))
    events: list[Event] = []
    kept = SearchDirectory.existing(small(tmp_path, resume=True), events.append)
    (said,) = events
    assert isinstance(said, Warned)
    assert "--space adamw_steplr: is not what the search was started with: gamma" in said.message
    assert kept.read_space().domains["gamma"].values[-1] == 0.8
    with pytest.raises(UserError, match="--space augmentation: is not what the search was start"):
        SearchDirectory.existing(small(tmp_path, resume=True, space="augmentation"))


def test_a_flag_kept_its_value_and_is_no_change_of_the_space(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(SPACE)
    where = ["--name", "s", "--storage-path", str(tmp_path)]
    config = parse_tune([*where, "--space", str(tmp_path / "my.yaml"), "--lr", "0.5"])
    SearchDirectory.create(config, searched_space(config))
    SearchDirectory.existing(parse_tune([*where, "--resume"]))
    SearchDirectory.existing(parse_tune([*where, "--resume", "--lr", "0.5"]))
    with pytest.raises(UserError, match="--gamma: the search draws gamma from its space"):
        SearchDirectory.existing(parse_tune([*where, "--resume", "--gamma", "0.5"]))


# --- NaN ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_ends_with_nan_in_a_search_for_the_lowest_loss(tmp_path: Path) -> None:
    settings = {"metric": "val_loss", "search": "optuna"}
    searched = search(small(tmp_path, **settings), training=trials.diverging)
    assert searched.summary["best_trial"] == "t0002"
    assert list(searched.table["val_loss"][1:]) == [0.3, 0.1]
    assert list(searched.table["best_epoch"][1:]) == [1, 2]
    best = read_settings(searched.directory.best_file)
    assert best["lr"] == searched.table["lr"][2]
    assert _results(searched, small(tmp_path, **settings))[2].split()[0] == "t0002"
    more = search(small(tmp_path, num_samples=4, resume=True, **settings), training=curve)
    assert list(more.table["status"]) == ["completed"] * 4


def table_of(folder: Path, losses: list[list[float]], **settings) -> TrialTable:
    """A table of trials that reached these losses and ended."""
    config = small(folder, metric="val_loss", **settings)
    space = read_space(config.space)
    drawn = dict(enumerate(space.draws(0, len(losses))))
    table = TrialTable(config, space, drawn)
    for number, values in enumerate(losses):
        for epoch, value in enumerate(values, 1):
            table.add_row(number, {**dict.fromkeys(METRICS, 0.5), "epoch": epoch,
                                   "val_loss": value})  # fmt: skip
        table.end(number)
    return table


def test_every_trial_ends_with_nan(tmp_path: Path) -> None:
    table = table_of(tmp_path, [[math.nan], [math.inf, math.nan]])
    assert table.best() is None
    assert table.summary()["best_trial"] is None
    directory = SearchDirectory(tmp_path)
    table.write(directory)
    assert not directory.best_file.exists()


@pytest.mark.parametrize("scheduler", ["asha", "none"])
def test_optuna_learns_that_nan_is_bad(tmp_path: Path, scheduler: str) -> None:
    table = table_of(
        tmp_path, [[math.nan], [math.inf], [0.5], *[[0.4]] * 10], search="optuna",
        scheduler=scheduler,
    )  # fmt: skip
    optuna = Optuna(table.config, table.space, table)
    for number in table.numbers():
        optuna.observe(number, table.row(number))
    assert [each.value for each in optuna._study.trials][:3] == [math.inf, math.inf, 0.5]
    assert optuna.draw(99).keys() == table.space.domains.keys()


def test_the_live_table_and_the_report_of_a_search_with_nan(tmp_path: Path) -> None:
    losses = [[math.nan], [0.4], [math.inf], [0.3]]
    table = table_of(tmp_path, losses)
    display = SearchDisplay(io.StringIO())
    display(SearchPlan(2, 4, 0, "val_loss", "min", []))
    for number in table.numbers():
        display(table.event(number))
    shown = display._table()
    assert list(shown.columns[0].cells) == ["t0003", "t0001", "t0000", "t0002"]
    assert [line.split()[0] for line in ranking(table.table(), "val_loss", "min")[1:]] == [
        "t0003", "t0001", "t0000", "t0002",
    ]  # fmt: skip
    config = small(tmp_path, metric="val_loss")
    directory = SearchDirectory.create(config, searched_space(config))
    table.write(directory)
    directory.write_summary({"status": "completed", **table.summary(), "seconds": 1.0})
    page = Path(str(write_report([directory.path], measure=False))).read_text()
    assert "parallel coordinates of 2 trials" in page


# --- what failed trials did not run ------------------------------------------------------------


def test_a_failed_trial_saves_nothing(tmp_path: Path) -> None:
    table = table_of(tmp_path, [[0.5, 0.4], [0.3], [0.9, 0.8]], scheduler="asha")
    table.end(1, "ZeroDivisionError: no trial divides by zero")
    searched = Searched(
        SearchDirectory(tmp_path), table.table(), {**table.summary(), "seconds": 1.0}
    )
    said = _results(searched, table.config)
    # The third ran an epoch beyond the rung at which it was stopped: that is not saved either.
    assert "ASHA stopped 1 of 3 trials: 5 of 6 epochs run, 0% saved" in said


def test_a_search_is_interrupted_before_its_first_trial(tmp_path: Path) -> None:
    table = table_of(tmp_path, [], scheduler="asha", search="optuna")
    directory = SearchDirectory(tmp_path)
    written = table.write(directory)
    assert len(written) == len(pd.read_parquet(directory.trials_parquet)) == 0
    searched = Searched(directory, written, {**table.summary(), "seconds": 0.0})
    assert "none ended an epoch" in _results(searched, table.config)


# --- a full disk -------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "training",
    [trials.on_a_full_disk, pytest.param(trials.in_a_lost_folder, marks=pytest.mark.slow)],
)
def test_the_disk_is_full_while_a_search_runs(tmp_path: Path, training) -> None:
    config = small(tmp_path, num_samples=4, max_concurrent=1)
    with pytest.raises(RunFailed, match=r"to resume: .* --name s --resume") as raised:
        search(config, training=training)
    assert ("No space left on device" in str(raised.value)) or "cannot be written" in str(
        raised.value
    )
    left = pd.read_csv(tmp_path / "s" / "trials.csv")
    assert list(left["status"])[:2] == ["completed", "unfinished"]
    assert "failed" not in set(left["status"])
    (tmp_path / "room").touch()
    resumed = search(config.replace(train=config.train.replace(resume=True)), training=training)
    assert list(resumed.table["status"]) == ["completed"] * 4


@pytest.mark.usefixtures("ray_cluster")
def test_failed_trials_are_run_again(tmp_path: Path) -> None:
    failed = search(small(tmp_path, num_samples=2), training=trials.failing_once)
    assert list(failed.table["status"]) == ["failed", "completed"]
    assert any("--retry-failed" in line for line in _results(failed, small(tmp_path)))
    (tmp_path / "corrected").touch()
    resumed = small(tmp_path, num_samples=2, resume=True)
    assert list(search(resumed).table["status"]) == ["failed", "completed"]
    again = search(resumed.replace(retry_failed=True), training=trials.failing_once)
    assert list(again.table["status"]) == ["completed", "completed"]
    assert not again.directory.trial(0).error_file.exists()
    assert not again.directory.read_config().retry_failed  # a word of that command alone
    with pytest.raises(UserError, match="--retry-failed: is for a search that is resumed"):
        small(tmp_path, retry_failed=True)
