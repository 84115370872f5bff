"""Ray Train: the worker function, and the driver's side of a run.

The driver imports this module, so nothing here loads Lightning or torchvision at import: only
workers do, when they run. It loads torch, which the driver's trainer needs: `cifar_dist.train`
imports this while Ray starts.
"""

from __future__ import annotations

import contextlib
import functools
import random
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from cifar_dist.cluster import ray_internals
from cifar_dist.cluster.controller import describe_failure, mark_ended_well
from cifar_dist.cluster.coordinator import Events, RequestListener, make_coordinator
from cifar_dist.cluster.notices import Notices
from cifar_dist.cluster.progress import HangWatch, ProgressReporter, Stall, name_workers
from cifar_dist.cluster.resources import Resources, worker_resources
from cifar_dist.cluster.session import ray_storage
from cifar_dist.cluster.threads import InThread
from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import Interrupted, RunFailed, UserError
from cifar_dist.events import (
    INTERRUPTED,
    Event,
    Fatal,
    Listener,
    Order,
    RestartCounter,
    Started,
    WorkerRaised,
    WorkersLost,
)
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.runs.metrics import Outcome
from cifar_dist.storage import AnyPath, delete_folder, storage_failure
from cifar_dist.variables import variables_set

RAY_FOLDER = ".ray"
"""The folder of Ray's own files, in the run's directory while the run lasts."""
POLL_S = 0.2
STOP_TIMEOUT_S = 120
"""How long workers that are asked to stop may take to come to a step's end and save."""
HUNG_STOP_TIMEOUT_S = 10
"""The same where they hang already."""
RESIZE_INTERVAL_S = 10
"""How often an elastic run checks whether it could have more workers."""
NOTICE_DEATH_S = 0.5
"""How often Ray Train checks that workers are alive; its default is 2 s."""
ELASTIC_PLACE_S = 30
"""How long an elastic run waits for its workers' places before it takes fewer. Ray's default is 60;
for 20 s after a node's loss it still counts on that node."""


class StoppedByScheduler(Exception):
    """Raised on every rank, at an epoch's end, of a trial that is to run no further."""


@dataclass(frozen=True)
class Work:
    """The arguments of a worker."""

    config: TrainConfig
    run: RunDirectory
    dataset_fingerprint: str
    launched: Mapping[str, Any]
    coordinator: Any
    is_trial: bool = False
    """Part of a search: at an epoch's end it waits for the scheduler, and it does not use the test
    images."""


Worker = Callable[[Work], Outcome | None]


def train_worker(work: Work) -> Outcome:
    """Train, on every worker; Ray Train calls it again, on new workers, after a failure."""
    from cifar_dist.data.cache import prepare_same

    config = work.config
    assert config.data_dir is not None  # resolved when the config was made
    notify = work.coordinator.put.remote
    dataset = prepare_same(config.dataset, config.data_dir, work.dataset_fingerprint, notify)

    # Imported after validation: these imports take most of a worker's start-up.
    from cifar_dist.training.torchmetrics_alone import load_torchmetrics_alone

    load_torchmetrics_alone()
    from ray.train.lightning import RayLightningEnvironment

    from cifar_dist.cluster.strategy import FixedBucketsStrategy
    from cifar_dist.training.callbacks import CountProgress
    from cifar_dist.training.fit import fit

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    # One name for this start on all ranks, so that the coordinator never mixes the steps of these
    # workers with those of workers that a failure has ended.
    start = ray.train.collective.broadcast_from_rank_zero(uuid.uuid4().hex)
    requests = RequestListener(work.coordinator, start, world_size, rank)
    progress = CountProgress()
    report = functools.partial(work.coordinator.report_progress.remote, start, world_size, rank)
    reporter = ProgressReporter(progress, config.step_timeout_s, report)
    outcome = fit(
        config,
        work.run,
        dataset,
        rank=rank,
        strategy="auto" if world_size == 1 else FixedBucketsStrategy(),
        plugins=[RayLightningEnvironment()],
        launched=work.launched,
        listener=notify,
        report=functools.partial(_report_and_wait, work, reporter)
        if work.is_trial
        else ray.train.report,
        ask=requests.ask,
        progress=progress,
        test=not work.is_trial,
    )
    requests.close()
    reporter.close()
    work.coordinator.leave.remote(start, rank)
    return outcome


def _report_and_wait(work: Work, reporter: ProgressReporter, row: dict[str, Any]) -> None:
    ray.train.report(row)
    with reporter.excused():
        goes_on = ray.get(work.coordinator.may_continue.remote(row["epoch"]))
    if not goes_on:
        raise StoppedByScheduler


def _on_each_worker(work: Work, worker: Worker) -> Outcome | None:
    """Call the worker, and report to the driver what it raises.

    Ray keeps the exception, but neither its traceback nor which rank was the first to raise;
    the others' broken connections are only consequences.
    """
    if (fatal := ray.get(work.coordinator.fatal_error.remote())) is not None:
        raise fatal  # Ray restarts workers after any error; end this restart at once
    try:
        outcome = worker(work)
    except (StoppedByScheduler, Interrupted):
        outcome = None  # on every rank
    except Exception as error:
        rank = ray.train.get_context().get_world_rank()
        event: Event = WorkerRaised(f"worker {rank}: {traceback.format_exc()}")
        if isinstance(error, UserError | RunFailed):
            event = Fatal(error)
        elif (failure := storage_failure(error)) is not None:
            event = Fatal(failure)  # new workers would find the same disk
        ray.get(work.coordinator.put.remote(event))  # waited for: this process may end next
        raise
    mark_ended_well()
    return outcome


def train_on_ray(
    config: TrainConfig,
    run: RunDirectory,
    dataset_fingerprint: str,
    launched: Mapping[str, Any],
    listener: RestartCounter,
    worker: Worker = train_worker,
    coordinator: Any = None,
) -> Outcome | None:
    """Train with DDP workers of the cluster that this process is connected to.

    Args:
        config: the run's settings.
        run: its directory, which all nodes see.
        dataset_fingerprint: of the data set that the driver decoded.
        launched: what the driver adds to ``environment.json``.
        listener: notified of progress, in the calling thread; the losses that it counts are the
            run's failures.
        worker: what each worker does.
        coordinator: of a trial, see `make_coordinator`.

    Returns:
        The outcome; None for a trial that was stopped.

    Raises:
        UserError: a worker found configuration or data wrong.
        RunFailed: the run failed after ``config.max_failures`` restarts, or in a way that none
            mends: it diverged, or a file cannot be written.
        Interrupted: as ``KeyboardInterrupt`` and itself, when one of them is raised here; the
            workers have saved a checkpoint. A second one is raised on at once.
    """
    is_trial = coordinator is not None
    coordinator = coordinator or make_coordinator()
    work = Work(config, run, dataset_fingerprint, launched, coordinator, is_trial)
    events = Events(coordinator)
    with variables_set(ray_settings(config), keep=True):
        while True:
            # A new controller would start to count at zero, and a run whose controller dies again
            # and again would never end.
            failures_left = config.max_failures - listener.losses
            attempt = _Attempt(work, worker, events, failures_left)
            try:
                return attempt.follow(listener)
            except RayActorError:
                # Ray Train's controller, which nobody else restarts.
                if listener.losses >= config.max_failures:
                    raise RunFailed("the process of Ray Train's controller died") from None
                attempt.clean_up()
                listener(WorkersLost("the process of Ray Train's controller died"))


def ray_settings(config: TrainConfig) -> dict[str, str]:
    """Return environment variables of Ray Train whose defaults are changed, unless they are set."""
    settings = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(NOTICE_DEATH_S)}
    if config.elastic:
        settings["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(ELASTIC_PLACE_S)
    if sum(node["Alive"] for node in ray.nodes()) == 1:
        # Skip the process that looks for nodes that are about to go: the only one takes it along.
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    return settings


class _Attempt:
    """A call of ``TorchTrainer.fit``: ends when training does, or its controller dies."""

    def __init__(self, work: Work, worker: Worker, events: Events, failures_left: int) -> None:
        config = work.config
        self._work = work
        self._events = events
        # Marks what the controller reserves, in a resource that there is plenty of, so that it
        # can be found and given back should the controller die.
        self._marked: Resources = {**worker_resources(config), "memory": random.randint(1, 2**20)}
        _forget_reservation(work.run)
        # A name that was used before would make Ray restore what it finds under it.
        delete_folder(work.run.path / RAY_FOLDER)
        self._trainer = ray_internals.torch_trainer(
            # Not as its configuration, which the controller would unpickle, and load torch for.
            functools.partial(_on_each_worker, work, worker),
            _backend(config),
            ScalingConfig(
                num_workers=(config.min_workers, config.max_workers)
                if config.elastic
                else config.max_workers,
                use_gpu=config.use_gpu,
                resources_per_worker=self._marked,
                elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
            ),
            RunConfig(
                name=RAY_FOLDER,
                **ray_storage(work.run.path),
                failure_config=FailureConfig(max_failures=failures_left),
                callbacks=[ray_internals.watch(work.coordinator, failures_left)],
            ),
            cleaned_up=not work.is_trial,
        )
        if config.elastic and (reservation := ray_internals.reservation(self._trainer)):
            _reservation_file(work.run).parent.mkdir(exist_ok=True)
            _reservation_file(work.run).write_text(reservation)
        self._raised: list[str] = []
        self._training = False
        self._hung: Stall | None = None
        """What the workers of this start wait for."""
        self._ended = False
        """Whether they were ended for it."""

    def follow(self, listener: Listener) -> Outcome | None:
        """Pass on what workers report until they are done.

        Raises:
            RayActorError: the controller died.
            UserError, RunFailed, Interrupted: as `train_on_ray`.
        """
        running = InThread(self._trainer.fit)
        notices = Notices(self._work.coordinator, listener)
        watch = HangWatch(self._work.coordinator, listener, self._work.config.step_timeout_s)
        stop_at: float | None = None
        try:
            while True:
                try:
                    # Asked for before the events are taken, so that the last ones are not missed.
                    alive = running.alive
                    self._pass_on(listener, last=not alive)
                    if not alive:
                        break
                    # Workers that never come to a step's end, e.g. in a collective with a rank that
                    # died, must not keep the command from ending.
                    if stop_at is not None and time.monotonic() > stop_at:
                        raise Interrupted(self._nothing_saved(watch.stall))
                    if not self._work.is_trial:
                        notices.look()
                    if self._training:
                        self._end_hung(watch)
                    time.sleep(POLL_S)
                except (Interrupted, KeyboardInterrupt):
                    if stop_at is not None or self._work.is_trial or not self._training:
                        raise
                    stop_at = time.monotonic() + (
                        STOP_TIMEOUT_S if watch.stall is None else HUNG_STOP_TIMEOUT_S
                    )
                    self._work.coordinator.request.remote(Order.STOP)
                    listener(INTERRUPTED)
        finally:
            _forget_reservation(self._work.run)
            delete_folder(self._work.run.path / RAY_FOLDER)
        if isinstance(running.error, RayActorError):
            raise running.error
        if running.error is not None:
            said = self._raised[0].strip() if self._raised else describe_failure(running.error)
            if self._ended:
                said = f"{self._hung}; if its steps take so long, raise --step-timeout"
            elif self._hung is not None:
                # Workers that waited for one that hangs raise what their collectives do.
                said = f"{self._hung}\n{said}"
            raise RunFailed(said) from running.error
        outcome: Outcome | None = running.result and running.result.return_value
        if outcome is None and stop_at is not None:
            raise Interrupted
        return outcome

    def _end_hung(self, watch: HangWatch) -> None:
        """End workers that hang too long, so that Ray Train's controller restarts them."""
        failed = watch.look()
        self._hung = watch.stall
        if failed is not None:
            # By what they run on: whoever is stopped can be asked for nothing, and a worker that
            # ended itself would look like the one at fault.
            self.clean_up()
            self._work.coordinator.forget_progress.remote()
            self._training, self._ended = False, True

    def _nothing_saved(self, stall: Stall | None) -> str:
        who = "the workers" if stall is None else name_workers(stall.ranks)
        newest = next((each.name for each in self._work.run.checkpoints_newest_first()), "none")
        return (
            f"{who} came to no step's end, so nothing was saved now; the newest checkpoint is "
            f"{newest}"
        )

    def _pass_on(self, listener: Listener, last: bool) -> None:
        for event in self._events.take(last):
            match event:
                case Fatal(error):
                    raise error
                case WorkerRaised(message):
                    self._raised.append(message)
                    continue
                case Started():
                    self._raised.clear()  # a restart mended it
                    self._training, self._hung, self._ended = True, None, False
                case WorkersLost():
                    self._training = False
                    if self._hung is not None:
                        event = WorkersLost(f"{self._hung}")
            listener(event)

    def clean_up(self) -> None:
        """Give back what a dead controller had reserved; Ray itself would at the driver's end."""
        for group_id, group in placement_group_table().items():
            marks = {bundle.get("memory") for bundle in group["bundles"].values()}
            if group["state"] != "REMOVED" and marks == {self._marked["memory"]}:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group_id)))


def _reservation_file(run: RunDirectory) -> AnyPath:
    return run.path / RAY_FOLDER / "reservation"


def _forget_reservation(run: RunDirectory) -> None:
    """Give back what an elastic run's controller or driver had asked for before it was killed."""
    # There may be none, or nobody who remembers.
    with contextlib.suppress(OSError, ValueError, ray.exceptions.RayError):
        ray_internals.cancel_reservation(_reservation_file(run).read_text())


def _backend(config: TrainConfig) -> str:
    """Return NCCL for GPUs, unless two ranks may share one, which it refuses, and else Gloo."""
    assert config.gpus_per_worker is not None  # resolved when the config was made
    return "nccl" if config.gpus_per_worker >= 1 else "gloo"
