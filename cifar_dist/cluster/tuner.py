"""Ray Tune: how trials are chosen, placed, judged and stopped.

All of it is in the driver; what a trial does in its process is in `cifar_dist.cluster.trials`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from cifar_dist.cluster import ray_internals
from cifar_dist.cluster.resources import worker_resources
from cifar_dist.cluster.searcher import NumberedTrials, OfTheDriver, slots
from cifar_dist.cluster.session import ray_storage
from cifar_dist.cluster.threads import InThread
from cifar_dist.cluster.trials import Plan, SeveralWorkers, Training, one_worker, train_here
from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import RunFailed, StorageFailed
from cifar_dist.events import Event, Listener
from cifar_dist.search.directory import SearchDirectory, trial_id
from cifar_dist.search.suggestions import Optuna
from cifar_dist.search.trials import TrialTable
from cifar_dist.storage import delete_folder, storage_failure
from cifar_dist.variables import variables_set

RAY_FOLDER = ".ray"
"""The folder of Ray's own files, in the search's directory while the search lasts."""
POLL_S = 0.1
WRITING_SHARE = 0.05
"""Most of the driver's time that goes into writing the tables while the search lasts."""
# A byte, since Ray takes no empty bundle. Not a part of a CPU: where workers fill a node's CPUs,
# 0.01 of one would cost a whole trial's place.
DRIVER_BUNDLE = {"memory": 1}
"""Resources of the process that supervises a trial of several workers: a byte of memory."""


class _InOrderScheduler(OfTheDriver, FIFOScheduler):
    """Scheduler that puts every result into the trial table, and stops the trials that it cuts."""

    def __init__(
        self,
        directory: SearchDirectory,
        trial_table: TrialTable,
        until: _Until,
        notify: Callable[[int], None],
    ) -> None:
        super().__init__()
        self._directory = directory
        self._trial_table = trial_table
        self._until = until
        self._notify = notify
        self._placed: set[str] = set()

    def on_trial_result(self, controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        number = trial.config["number"]
        if "epoch" in result:
            self._take(number, result)
            self._notify(number)
        if not self._ended(trial, result) and self._trial_table.stopped(number):
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)

    def _take(self, number: int, row: Mapping[str, Any]) -> None:
        run = self._directory.trial(number)
        if row["epoch"] > self._trial_table.epochs(number) + 1:
            # Its process, or that of its rank 0, died after a checkpoint and before the report.
            self._trial_table.add_rows_of(number, run)
        if (known := self._trial_table.epochs(number)) < row["epoch"] - 1:
            raise RunFailed(
                f"{run.metrics_file}: lacks epoch {known + 1} of a trial that is at epoch "
                f"{row['epoch']}"
            )
        self._trial_table.add_row(number, row)

    def on_trial_complete(self, controller: Any, trial: RayTrial, result: dict[str, Any]) -> None:
        self._ended(trial, result)  # a result that says "done" comes here alone

    def _ended(self, trial: RayTrial, result: dict[str, Any]) -> bool:
        if result.get("storage"):
            self._until.end(StorageFailed(result["storage"]))
        if result.get("ended"):
            number, most = trial.config["number"], self._trial_table.config.train.max_epochs
            if self._trial_table.epochs(number) < most:  # it failed, or died before a report
                self._trial_table.add_rows_of(number, self._directory.trial(number))
            self._trial_table.end(number, result.get("error"))
            if result.get("lost"):
                # Its process raises next, so that Tune ends it. Without this Tune would call the
                # trial again, in a warm process that would end the same way.
                trial.max_failures = 0
        return bool(result.get("ended"))

    def on_trial_error(self, controller: Any, trial: RayTrial) -> None:
        self._placed.discard(trial.trial_id)  # one that is restarted waits for a place again

    def choose_trial_to_run(self, controller: Any) -> RayTrial | None:
        # Not the one at the front, as Tune does: where its process is still starting, Tune would
        # give it a warm one, end the other, and start a further one for the trial after it.
        waiting = [
            each
            for each in controller.get_trials()
            if each.status == RayTrial.PENDING and each.trial_id not in self._placed
        ]
        chosen = min(waiting, key=lambda each: each.config["number"], default=None)
        if chosen is not None:
            self._placed.add(chosen.trial_id)
        return chosen


class _Bookkeeper(OfTheDriver, tune.Callback):
    """Callback that notifies of trials that begin and end, and tidies up after them."""

    def __init__(
        self, directory: SearchDirectory, trial_table: TrialTable, notify: Callable[[int], None]
    ) -> None:
        self._directory = directory
        self._trial_table = trial_table
        self._notify = notify

    def on_trial_start(self, iteration: int, trials: Any, trial: RayTrial, **info: Any) -> None:
        self._trial_table.start(trial.config["number"])
        self._notify(trial.config["number"])

    def on_trial_complete(self, iteration: int, trials: Any, trial: RayTrial, **info: Any) -> None:
        number = trial.config["number"]
        tidy(self._directory, self._trial_table, number)
        self._notify(number)

    def on_trial_error(self, iteration: int, trials: Any, trial: RayTrial, **info: Any) -> None:
        """Record a trial whose process died more often than it is restarted."""
        number = trial.config["number"]
        if not self._trial_table.finished(number):
            run = self._directory.trial(number)
            self._trial_table.add_rows_of(number, run)
            run.path.mkdir(parents=True, exist_ok=True)
            run.write_error(Path(trial.error_file).read_text())  # Tune's, since the process is dead
            text = (
                f"its process died {trial.run_metadata.num_failures} times: killed, out of memory, "
                "hung for --step-timeout, or its node was lost; see error.txt in its folder"
            )
            run.write_summary(self._trial_table.config.train.dataset, "failed", error=text)
            self._trial_table.end(number, text)
        tidy(self._directory, self._trial_table, number)
        self._notify(number)


class _Until(OfTheDriver, tune.Stopper):
    """Stopper that ends the search when its time is over, or on request."""

    def __init__(self, seconds: float | None) -> None:
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._requested = threading.Event()
        self.error: RunFailed | None = None
        """Why the search cannot continue."""

    def end(self, error: RunFailed | None = None) -> None:
        """Request the end."""
        self.error = self.error or error
        self._requested.set()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return late or self._requested.is_set()


def tidy(directory: SearchDirectory, trial_table: TrialTable, number: int) -> None:
    """Delete the checkpoints of a trial that nobody resumes, and record that it was stopped."""
    if not trial_table.finished(number):
        return
    run = directory.trial(number)
    # Up to three are kept a trial, 134 MB each for ResNet-18: a search of hundreds of trials would
    # fill the disk.
    delete_folder(run.checkpoints)
    if trial_table.stopped(number) and run.read_summary().get("status") != "stopped":
        run.write_summary(
            trial_table.config.train.dataset, "stopped", seconds=trial_table.seconds(number)
        )


def run_trials(
    directory: SearchDirectory,
    trial_table: TrialTable,
    suggestions: Optuna | None,
    numbers: list[int],
    dataset_fingerprint: str,
    launched: Mapping[str, Any],
    listener: Listener,
    training: Training = train_here,
) -> None:
    """Run trials on the cluster that this process is connected to, until all have ended.

    The trial_table holds what came of them, and the tables in the directory are kept up to date.

    Args:
        directory: the search's.
        trial_table: what is known so far.
        suggestions: where trials' values come from; None where the table has them.
        numbers: of the trials to run, ascending.
        dataset_fingerprint: of the data set that the driver decoded.
        launched: what the driver adds to each ``environment.json``.
        listener: notified of progress, in the calling thread.
        training: what a trial of one worker does.

    Raises:
        StorageFailed: a trial, or this process, could not write its files; what was running is
            unfinished.
        RunFailed: Ray Tune itself failed.
    """
    config = trial_table.config
    base = config.trial_base
    events: queue.Queue[Event] = queue.Queue()

    def notify(number: int) -> None:
        events.put(trial_table.event(number))

    plan = Plan(
        directory, base, trial_table.space.configured, dataset_fingerprint, launched, training,
        ray_internals.enabled(),
    )  # fmt: skip
    # A name that was used before would make Ray restore what it finds under it.
    delete_folder(directory.path / RAY_FOLDER)
    until = _Until(config.time_budget_s)

    with _quiet_tune(config.train.verbose, slots(config)):
        tuner = tune.Tuner(
            _trainable(config.workers, base, plan),
            tune_config=tune.TuneConfig(
                search_alg=NumberedTrials(numbers, suggestions, trial_table),
                scheduler=_InOrderScheduler(directory, trial_table, until, notify),
                num_samples=len(numbers),
                # A warm process saves a trial seconds of imports. The class of trials with several
                # workers has no `reset_config`, which reuse requires.
                reuse_actors=config.workers == 1,
                trial_name_creator=lambda trial: trial_id(trial.config["number"]),
                trial_dirname_creator=lambda trial: trial_id(trial.config["number"]),
            ),
            run_config=tune.RunConfig(
                name=RAY_FOLDER,
                **ray_storage(directory.path),
                failure_config=tune.FailureConfig(max_failures=base.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[_Bookkeeper(directory, trial_table, notify)],
                stop=until,
                verbose=2 if config.train.verbose else 0,
            ),
        )
        running = InThread(tuner.fit)
        try:
            _follow(running, events, trial_table, directory, listener)
        except BaseException:
            until.end()  # where the cluster outlives this call, its trials do not
            raise
        finally:
            delete_folder(directory.path / RAY_FOLDER)
    if running.error is not None:
        if (failure := storage_failure(running.error)) is not None:
            raise failure
        # Tune wraps what a callback raises, with its traceback as the message.
        if isinstance(running.error.__context__, RunFailed):
            raise running.error.__context__
        raise RunFailed("".join(traceback.format_exception(running.error)).strip())
    if until.error is not None:
        raise until.error
    # A trial may reach its last epoch before the results come in that stop it at a rung: then its
    # own folder says that it was completed.
    for number in numbers:
        tidy(directory, trial_table, number)


def _follow(
    running: InThread,
    events: queue.Queue[Event],
    trial_table: TrialTable,
    directory: SearchDirectory,
    listener: Listener,
) -> None:
    write_next, changed = time.monotonic(), True
    while True:
        alive = running.alive
        try:
            event = events.get(timeout=POLL_S)
        except queue.Empty:
            if not alive:
                return
        else:
            changed = True
            listener(event)
        if changed and time.monotonic() >= write_next:
            began = time.monotonic()
            trial_table.write(directory)
            ended_at = time.monotonic()
            # The next write waits in proportion to what this one took: the tables grow with the
            # search, and a fixed interval would let them take ever more of the driver's time.
            write_next, changed = ended_at + (ended_at - began) / WRITING_SHARE, False


def _trainable(workers: int, base: TrainConfig, plan: Plan) -> Any:
    each = worker_resources(base)
    bundle = each if workers == 1 else DRIVER_BUNDLE
    trainable: Any = one_worker if workers == 1 else SeveralWorkers
    return tune.with_resources(
        tune.with_parameters(trainable, plan=plan), tune.PlacementGroupFactory([bundle])
    )


@contextmanager
def _quiet_tune(verbose: bool, slots: int) -> Iterator[None]:
    """Set what Tune reads from the environment, and its logger's level, while this lasts."""
    settings = {
        # As many processes start at once as there is room for; one at a time otherwise.
        "TUNE_MAX_PENDING_TRIALS_PG": str(slots),
        # The trial_table and the trials' folders hold what Tune would write down a second time.
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": str(10**9),
        "TUNE_PRINT_ALL_TRIAL_ERRORS": str(int(verbose)),
        "RAY_AIR_NEW_OUTPUT": "0",
        # A trial may end without a result, e.g. one that had reached its last epoch before.
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    }
    logger = logging.getLogger("ray.tune")
    level = logger.level
    if not verbose:
        logger.setLevel(logging.CRITICAL)
    try:
        with variables_set(settings):
            yield
    finally:
        logger.setLevel(level)
