"""Ray Train: the worker function, and the driver's side of a run.

The driver and Ray's controller import this module, so nothing here loads Lightning or torchvision
at import: only workers do, when they run. Torch itself comes with TorchTrainer.
"""

from __future__ import annotations

import asyncio
import functools
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cifar_dist.cluster.session import worker_resources
from cifar_dist.cluster.threads import InThread
from cifar_dist.config import TrainConfig
from cifar_dist.errors import Diverged, RunFailed, UserError
from cifar_dist.events import Event, Listener
from cifar_dist.runs import Outcome, RunDirectory

RAY_FOLDER = ".ray"
"""What Ray writes of its own, in the run's directory while the run lasts."""
POLL_S = 0.2


class StoppedByScheduler(Exception):
    """Raised on every rank, at an epoch's end, of a trial that is to run no further."""


@ray.remote(num_cpus=0)
class Mailbox:
    """Carries events from rank 0 to the driver, whatever becomes of the workers.

    In a trial it also holds every rank at an epoch's end until the scheduler has decided.

    Args:
        wait: hold the ranks.
    """

    def __init__(self, wait: bool = False) -> None:
        self._events: list[Event] = []
        self._hopeless: Exception | None = None
        self._let_run_to = 0 if wait else sys.maxsize
        self._stopped = False
        self._decided = asyncio.Condition()

    async def put(self, event: Event) -> None:
        """Add an event."""
        self._events.append(event)
        if event["kind"] == "hopeless":
            self._hopeless = event["error"]

    async def hopeless(self) -> Exception | None:
        """What a worker found wrong that no restart mends, if anything."""
        return self._hopeless

    async def take(self) -> list[Event]:
        """All events since the last call, in order."""
        taken, self._events = self._events, []
        return taken

    async def go_on(self, epoch: int, stop: bool = False) -> None:
        """Let ranks run on behind an epoch's end (1-based), or make them stop at the next one."""
        async with self._decided:
            self._let_run_to = max(self._let_run_to, epoch)
            self._stopped = self._stopped or stop
            self._decided.notify_all()

    async def may_go_on(self, epoch: int) -> bool:
        """Whether a rank that ended an epoch (1-based) goes on; the answer waits for `go_on`."""
        async with self._decided:
            await self._decided.wait_for(lambda: self._stopped or epoch <= self._let_run_to)
        return not self._stopped


@dataclass(frozen=True)
class Work:
    """All that a worker needs to know."""

    config: TrainConfig
    run: RunDirectory
    dataset_fingerprint: str
    launched: Mapping[str, Any]
    mailbox: Any
    is_trial: bool = False
    """Of a search: at an epoch's end it waits for the scheduler, and it leaves the test images
    alone."""


Worker = Callable[[Work], Outcome | None]


def train_worker(work: Work) -> Outcome:
    """What every worker does; Ray Train calls it again, on new workers, after a failure."""
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

    from cifar_dist.data.cache import prepare_same
    from cifar_dist.training.fit import fit

    config = work.config
    assert config.data_dir is not None  # settled when the config was made
    dataset = prepare_same(config.dataset, config.data_dir, work.dataset_fingerprint)
    return fit(
        config,
        work.run,
        dataset,
        rank=ray.train.get_context().get_world_rank(),
        strategy=RayDDPStrategy(
            # Statistics of batch normalisation are averaged once an epoch instead.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            # Keeps DDP from rebuilding its buckets after the first step. With 3 or more workers
            # that would change the order of sums, so a restart's first step would differ.
            find_unused_parameters=True,
        ),
        plugins=[RayLightningEnvironment()],
        launched=work.launched,
        listener=work.mailbox.put.remote,
        report=functools.partial(_report_and_wait, work) if work.is_trial else ray.train.report,
        test=not work.is_trial,
    )


def _report_and_wait(work: Work, row: dict[str, Any]) -> None:
    ray.train.report(row)
    if not ray.get(work.mailbox.may_go_on.remote(row["epoch"])):
        raise StoppedByScheduler


def _on_each_worker(settings: dict[str, Any]) -> Outcome | None:
    """Call the worker, and tell the driver what it raises.

    Ray keeps the exception, but neither its traceback nor which rank was the first to raise;
    the others' broken connections are only consequences.
    """
    work: Work = settings["work"]
    worker: Worker = settings["worker"]
    if (hopeless := ray.get(work.mailbox.hopeless.remote())) is not None:
        raise hopeless  # a restart that Ray insists on: over at once
    try:
        return worker(work)
    except StoppedByScheduler:
        return None
    except Exception as error:
        rank = ray.train.get_context().get_world_rank()
        event: Event = {"kind": "raised", "message": f"worker {rank}: {traceback.format_exc()}"}
        if isinstance(error, UserError | Diverged):
            event = {"kind": "hopeless", "error": error}
        ray.get(work.mailbox.put.remote(event))  # waited for: this process may end next
        raise


def train_on_ray(
    config: TrainConfig,
    run: RunDirectory,
    dataset_fingerprint: str,
    launched: Mapping[str, Any],
    listener: Listener,
    worker: Worker = train_worker,
    mailbox: Any = None,
) -> Outcome | None:
    """Train with DDP workers of the cluster that this process is connected to.

    Args:
        config: the run's settings.
        run: its directory, which all nodes see.
        dataset_fingerprint: of the data set that the driver decoded.
        launched: what the driver adds to ``environment.json``.
        listener: told of progress, in the calling thread.
        worker: what each worker does.
        mailbox: of a trial, see `make_mailbox`.

    Returns:
        What came of it; of a trial that was stopped, None.

    Raises:
        UserError: what a worker found wrong with configuration or data.
        RunFailed: the run failed after ``config.max_failures`` restarts, or diverged.
    """
    is_trial = mailbox is not None
    mailbox = mailbox or make_mailbox()
    work = Work(config, run, dataset_fingerprint, launched, mailbox, is_trial)
    workers = (config.min_workers, config.max_workers) if config.elastic else config.max_workers
    # A name that was used before would make Ray restore what it finds under it.
    shutil.rmtree(run.path / RAY_FOLDER, ignore_errors=True)
    trainer = TorchTrainer(
        _on_each_worker,
        train_loop_config={"work": work, "worker": worker},
        torch_config=TorchConfig(backend=_backend(config)),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=config.use_gpu,
            resources_per_worker=worker_resources(config),
        ),
        run_config=RunConfig(
            name=RAY_FOLDER,
            storage_path=str(run.path),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    running = InThread(trainer.fit)
    raised: list[str] = []
    try:
        while True:
            # Asked for before the events are taken, so that the last ones are not missed.
            alive = running.alive
            for event in ray.get(mailbox.take.remote()):
                if event["kind"] == "hopeless":
                    raise event["error"]
                if event["kind"] == "raised":
                    raised.append(event["message"])
                    continue
                if event["kind"] == "start":
                    raised.clear()  # a restart mended it
                listener(event)
            if not alive:
                break
            time.sleep(POLL_S)
    finally:
        shutil.rmtree(run.path / RAY_FOLDER, ignore_errors=True)
    if running.error is not None:
        raise RunFailed(raised[0].strip() if raised else _cause(running.error)) from running.error
    outcome: Outcome | None = running.result.return_value
    return outcome


def make_mailbox(wait: bool = False) -> Any:
    """A `Mailbox` on this process's node: the loss of any other must not take it along.

    Args:
        wait: hold every rank at an epoch's end until ``go_on`` is called, as a trial needs it.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Mailbox.options(scheduling_strategy=here).remote(wait)  # type: ignore[attr-defined]


def _backend(config: TrainConfig) -> str | None:
    """NCCL refuses two ranks on one GPU, which fractions may give; None leaves it to Ray."""
    assert config.gpus_per_worker is not None  # settled when the config was made
    return "gloo" if 0 < config.gpus_per_worker < 1 else None


def _cause(error: BaseException) -> str:
    """What ended workers that could say nothing, e.g. because they were killed."""
    if isinstance(error, WorkerGroupError):
        return "\n".join(f"worker {rank}: {e}" for rank, e in error.worker_failures.items())
    return str(error).strip() or type(error).__name__
