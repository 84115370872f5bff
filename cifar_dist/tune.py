"""``python -m cifar_dist.tune``: search hyperparameters with Ray Tune and ASHA."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cifar_dist import __version__
from cifar_dist.cli import parse_tune
from cifar_dist.config.checks import check_image_side
from cifar_dist.config.files import read_settings
from cifar_dist.config.train import TrainConfig, with_absolute_paths
from cifar_dist.config.tune import TuneConfig
from cifar_dist.errors import Interrupted, RunFailed, UserError
from cifar_dist.events import Listener, SearchPlan, ignore
from cifar_dist.exits import run_command
from cifar_dist.model.networks import check_network, check_starting_weights
from cifar_dist.reports.attempt import leave_report
from cifar_dist.runs.commit import git_commit
from cifar_dist.runs.lock import Lock, locked
from cifar_dist.search.directory import SearchDirectory
from cifar_dist.search.space import Space, searched_space
from cifar_dist.terminal.hints import files_in, resume_command, shown

if TYPE_CHECKING:
    import pandas as pd

    from cifar_dist.cluster.trials import Training
    from cifar_dist.data.cache import CachedDataset
    from cifar_dist.search.suggestions import Optuna
    from cifar_dist.search.trials import TrialTable

COMMAND = "python -m cifar_dist.tune"


@dataclass(frozen=True)
class Searched:
    """The result of `search`."""

    directory: SearchDirectory
    table: pd.DataFrame
    """The content of ``trials.csv``: a row a trial."""
    summary: dict[str, Any]
    """The content of ``summary.json``."""


def tune(
    config: TuneConfig, listener: Listener = ignore, command: str | None = None
) -> pd.DataFrame:
    """Search, leave a search directory, and return its table: a row a trial.

    Args and raises as `search`.
    """
    return search(config, listener, command).table


def search(
    config: TuneConfig,
    listener: Listener = ignore,
    command: str | None = None,
    training: Training | None = None,
) -> Searched:
    """Search, and leave a search directory.

    Args:
        config: the search.
        listener: notified of progress, in this thread; see `cifar_dist.events`.
        command: what was typed, for the trials' ``environment.json``.
        training: what a trial of one worker does instead of training; for measurements and tests.

    Raises:
        UserError: bad configuration, space or data, too few resources, or another command works in
            the search's directory; a new search leaves nothing.
        RunFailed: every trial failed.
        Interrupted: the process was asked to stop; what is needed to resume is saved.
    """
    config = config.replace(train=with_absolute_paths(config.train))
    if config.train.resume:
        directory = SearchDirectory.existing(config, listener)
        space = directory.read_space()
        space.check(config.trial_base)
        with locked(directory.path, listener) as lock:
            # What trials have left is read only now that nobody adds to it.
            tried = _trial_table(config, space, directory)
            return _search(config, directory, lock, tried, listener, command, training)
    # All draws are made and checked before the directory exists, so that a refusal leaves none.
    space = searched_space(config)
    tried = _trial_table(config, space)
    directory = SearchDirectory.create(config, space)
    with locked(directory.path, listener) as lock:
        return _search(config, directory, lock, tried, listener, command, training)


def _search(
    config: TuneConfig,
    directory: SearchDirectory,
    lock: Lock,
    tried: tuple[TrialTable, Optuna | None],
    listener: Listener,
    command: str | None,
    training: Training | None,
) -> Searched:
    """Search in a directory that no other command writes into; see `search`."""
    began = time.monotonic()
    trial_table, suggestions = tried
    resume, storage_path = config.train.resume, config.train.storage_path
    to_resume = f"to resume: {resume_command(COMMAND, directory.name, storage_path)}"

    def finish(status: str) -> Searched:
        table = trial_table.write(directory)
        summary = {
            "status": status,
            **trial_table.summary(),
            "seconds": round(time.monotonic() - began, 3),
        }
        directory.write_summary(summary)
        return Searched(directory, table, summary)

    try:
        launched = {"command": command, "git_commit": git_commit()}
        _run(config, directory, trial_table, suggestions, launched, listener, training)
    except UserError:
        if not resume:
            directory.discard()
        raise
    except (Interrupted, KeyboardInterrupt):
        lock.check()
        with contextlib.suppress(Exception):  # must not hide how to resume
            finish("interrupted")
        raise Interrupted(f"interrupted; {to_resume}") from None
    except RunFailed as error:
        with contextlib.suppress(Exception):
            finish("failed")
        raise RunFailed(f"{error}\n{to_resume}") from error
    except Exception as error:  # which no code expects, e.g. a library's
        if resume or not directory.discard():
            error.add_note(to_resume)
            with contextlib.suppress(Exception):
                finish("failed")
        raise
    lock.check()
    if not directory.config_file.is_file():
        finish("failed")
        raise RunFailed(
            f"{directory.path}: its files were removed or moved while the search ran; its tables "
            "are written anew, and it cannot be resumed: start it with another --name"
        )
    unfinished = bool(trial_table.summary()["unfinished"])
    searched = finish("unfinished" if unfinished else "completed")
    if config.train.report:
        leave_report(directory, listener)
    if searched.summary["failed"] == len(searched.table) > 0:
        first = searched.table["error"].iloc[0]
        # Raised last: the tables, which hold every trial's error, are written by then.
        raise RunFailed(
            f"all {len(searched.table)} trials failed, the first with: {first}; "
            f"their tracebacks are in {shown(directory.trials_folder)}\n"
            f"to run them again: {_retry_command(directory, storage_path)}"
        )
    return searched


def _trial_table(
    config: TuneConfig, space: Space, resumed: SearchDirectory | None = None
) -> tuple[TrialTable, Optuna | None]:
    """Return the record of the trials, and Optuna where it suggests their values."""
    from cifar_dist.search.suggestions import Optuna, drawn_values
    from cifar_dist.search.trials import TrialTable

    drawn: Mapping[int, Mapping[str, Any]]
    if config.search == "optuna":
        drawn = {} if resumed is None else _suggested_before(resumed, space)
    else:
        drawn = drawn_values(config, space)
    trial_table = TrialTable(config, space, drawn)
    if resumed is not None:
        trial_table.load(resumed)
    if config.search != "optuna":
        return trial_table, None
    optuna = Optuna(config, space, trial_table)
    for number in drawn:
        if trial_table.finished(number):
            # In the order of numbers, so that a search that is resumed twice gives Optuna the same
            # history.
            optuna.observe(number, trial_table.row(number))
    return trial_table, optuna


def _suggested_before(directory: SearchDirectory, space: Space) -> dict[int, dict[str, Any]]:
    """Return the values that trials of a resumed search were given, by number."""
    found = {}
    folders = directory.trials_folder.glob("t*")
    for number in sorted(int(folder.name.removeprefix("t")) for folder in folders):
        file = directory.trial(number).config_file
        # A kill may come between a trial's folder and its config.
        if file.is_file():
            settings = read_settings(file)
            found[number] = {name: settings[name] for name in space.domains}
    return found


def _run(
    config: TuneConfig,
    directory: SearchDirectory,
    trial_table: TrialTable,
    suggestions: Optuna | None,
    launched: dict[str, Any],
    listener: Listener,
    training: Training | None,
) -> None:
    """Check what can be checked here, then run the trials that are left."""
    from cifar_dist.data.cache import prepare
    from cifar_dist.data.datasets import find_source

    base = config.trial_base
    optuna = config.search == "optuna"
    numbers = list(range(config.num_samples)) if optuna else trial_table.numbers()
    left = [number for number in numbers if not trial_table.finished(number)]
    trials = _configs(config, trial_table)
    for trial in trials:
        check_network(trial)
    source = find_source(base.dataset, str(base.data_dir))
    image_side = source.image_side()
    # Checked again, now that the images' size is known.
    trial_table.space.check(base, image_side)
    for trial in _configs(config, trial_table):
        check_image_side(trial, image_side)
    # Nothing is left to run, so Ray is not started.
    if not left:
        return

    from cifar_dist.cluster.resources import TUNE_FLAGS, have_resources
    from cifar_dist.cluster.session import check_shared, session

    with session(config.train.verbose) as where:
        have_resources(base, listener, TUNE_FLAGS)
        check_shared(directory.path)
        # Imported after the checks: Ray Tune takes seconds to load, which would delay a refusal.
        from cifar_dist.cluster.searcher import slots
        from cifar_dist.cluster.trials import train_here
        from cifar_dist.cluster.tuner import run_trials, tidy

        before = (directory.trial(number).started_with_fingerprint() for number in left)
        started_with = next(filter(None, before), None)
        dataset = prepare(base.dataset, source, started_with, listener)
        # Once for all trials that start alike, however many there are.
        for trial in {(each.weights, each.network, each.stem): each for each in trials}.values():
            check_starting_weights(trial, listener)
        for trial in trials:
            dataset.check_batches(trial.batch_size, config.workers)
        for number in numbers:
            if number not in left:
                # A driver that was killed may have left checkpoints of trials that had ended.
                tidy(directory, trial_table, number)
            elif directory.trial(number).started_with_fingerprint() not in (
                None,
                dataset.fingerprint,
            ):
                raise UserError(
                    f"--data-dir {base.data_dir}: holds other data than the search was started "
                    "with; name the folder that it was started with"
                )
        # Only now, when nothing refuses the search any more: a refused resume changes nothing.
        directory.remove_leftovers()
        directory.write_config(config)
        for number in left:
            if directory.trial(number).read_summary().get("status") == "failed":
                directory.retry(number)
        listener(_plan(config, directory, trial_table, dataset, where, len(left), slots(config)))
        run_trials(
            directory, trial_table, suggestions, left, dataset.fingerprint, launched, listener,
            training or train_here,
        )  # fmt: skip


def _configs(config: TuneConfig, trial_table: TrialTable) -> list[TrainConfig]:
    """Return the trials' configs, as far as they are known beforehand."""
    # With Optuna nothing is drawn yet: then the settings that trials share are checked alone.
    drawn = [trial_table.drawn(number) for number in trial_table.numbers()]
    return [trial_table.trial_config(each) for each in drawn if each is not None] or [
        config.trial_base
    ]


def _plan(
    config: TuneConfig,
    directory: SearchDirectory,
    trial_table: TrialTable,
    dataset: CachedDataset,
    where: str,
    left: int,
    slots: int,
) -> SearchPlan:
    base = config.trial_base
    trials = config.num_samples if config.search == "optuna" else len(trial_table.numbers())
    device, each = (
        ("GPU", config.gpus_per_trial) if base.use_gpu else ("CPU", config.cpus_per_trial)
    )
    workers = f"{config.workers} workers, " if config.workers > 1 else ""
    asha = (
        f"ASHA with grace period {config.grace_period}, "
        f"reduction factor {config.reduction_factor:g}"
        if config.scheduler == "asha"
        else "no early stopping"
    )
    again = f", {left} of them left" if left < trials else ""
    return SearchPlan(
        max_epochs=base.max_epochs,
        trials=trials,
        finished=trials - left,
        metric=config.metric,
        mode=config.mode,
        lines=[
            f"cifar_dist {__version__}: search of {', '.join(trial_table.space.domains)} "
            f"({config.search}) on {base.dataset} ({dataset.train_images:,} training, "
            f"{dataset.validation_images:,} validation images)",
            f"{trials} trials{again}, {min(slots, left)} at a time ({workers}{each:g} {device} "
            f"each) on {where}; at most {base.max_epochs} epochs, {asha}, by {config.metric}",
            f"search {shown(directory.path)}",
        ],
    )


def _retry_command(directory: SearchDirectory, storage_path: str) -> str:
    return resume_command(COMMAND, directory.name, storage_path, "--retry-failed")


def _results(searched: Searched, config: TuneConfig) -> list[str]:
    from cifar_dist.search.trials import epochs_saved
    from cifar_dist.terminal.run import duration
    from cifar_dist.terminal.search import ranking

    summary, directory = searched.summary, searched.directory
    lines = ["the best trials:", *ranking(searched.table, config.metric, config.mode)]
    run, possible = summary["epochs_run"], summary["epochs_possible"]
    if config.scheduler == "asha" and possible:
        saved = epochs_saved(searched.table, summary, config.train.max_epochs)
        lines.append(
            f"ASHA stopped {summary['stopped']} of {summary['trials']} trials: {run} of "
            f"{possible} epochs run, {saved / possible:.0%} saved"
        )
    failed = f", {summary['failed']} failed" if summary["failed"] else ""
    lines += [
        f"done in {duration(summary['seconds'])}: {summary['completed']} trials completed, "
        f"{summary['stopped']} stopped{failed}",
        f"files in {shown(directory.path)}: {files_in(directory.path)}",
    ]
    if failed:
        again = _retry_command(directory, config.train.storage_path)
        lines.append(f"to run the failed ones again: {again}")
    if summary["unfinished"]:
        lines.append(
            f"time budget of {config.time_budget} over, {summary['unfinished']} trials "
            f"unfinished; to resume: "
            f"{resume_command(COMMAND, directory.name, config.train.storage_path)}"
        )
    if summary["best_trial"] is not None:
        best = shlex.quote(str(shown(directory.best_file)))
        lines.append(f"next: python -m cifar_dist.train --config {best}")
    return lines


def main(words: list[str]) -> None:
    """Parse, search, and print the results."""
    config = parse_tune(words)

    from cifar_dist.terminal.search import SearchDisplay

    display = SearchDisplay(sys.stdout)
    try:
        searched = search(config, display, command=shlex.join([*COMMAND.split(), *words]))
    finally:
        display.close()
    for line in _results(searched, config):
        display.line(line)


if __name__ == "__main__":
    run_command(main)
