"""Ray Train: the worker function, and the driver's side of a run.

The driver and Ray's controller import this module, so nothing here loads Lightning or torchvision
at import: only workers do, when they run. Torch itself comes with TorchTrainer.
"""

from __future__ import annotations

import shutil
import threading
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
from cifar_dist.config import TrainConfig
from cifar_dist.errors import RunFailed, UserError
from cifar_dist.events import Event, Listener
from cifar_dist.runs import Outcome, RunDirectory

RAY_FOLDER = ".ray"
"""What Ray writes of its own, in the run's directory while the run lasts."""
POLL_S = 0.2


@ray.remote(num_cpus=0)
class Mailbox:
    """Carries events from rank 0 to the driver, whatever becomes of the workers."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._refused: str | None = None

    def put(self, event: Event) -> None:
        """Add an event."""
        self._events.append(event)
        if event["kind"] == "refused":
            self._refused = event["message"]

    def refused(self) -> str | None:
        """What a worker found wrong that no restart mends, if anything."""
        return self._refused

    def take(self) -> list[Event]:
        """All events since the last call, in order."""
        taken, self._events = self._events, []
        return taken


@dataclass(frozen=True)
class Work:
    """All that a worker needs to know."""

    config: TrainConfig
    run: RunDirectory
    dataset_fingerprint: str
    launched: Mapping[str, Any]
    mailbox: Any


Worker = Callable[[Work], Outcome]


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
        report=ray.train.report,
    )


def _on_each_worker(settings: dict[str, Any]) -> Outcome:
    """Call the worker, and tell the driver what it raises.

    Ray keeps the exception, but neither its traceback nor which rank was the first to raise;
    the others' broken connections are only consequences.
    """
    work: Work = settings["work"]
    worker: Worker = settings["worker"]
    if (refused := ray.get(work.mailbox.refused.remote())) is not None:
        raise UserError(refused)  # a restart that Ray insists on: over at once
    try:
        return worker(work)
    except Exception as error:
        rank = ray.train.get_context().get_world_rank()
        mendable = not isinstance(error, UserError)
        event = {
            "kind": "raised" if mendable else "refused",
            "message": f"worker {rank}: {traceback.format_exc()}" if mendable else str(error),
        }
        ray.get(work.mailbox.put.remote(event))  # waited for: this process may end next
        raise


def train_on_ray(
    config: TrainConfig,
    run: RunDirectory,
    dataset_fingerprint: str,
    launched: Mapping[str, Any],
    listener: Listener,
    worker: Worker = train_worker,
) -> Outcome:
    """Train with DDP workers of the cluster that this process is connected to.

    Args:
        config: the run's settings.
        run: its directory, which all nodes see.
        dataset_fingerprint: of the data set that the driver decoded.
        launched: what the driver adds to ``environment.json``.
        listener: told of progress, in the calling thread.
        worker: what each worker does.

    Raises:
        UserError: what a worker found wrong with configuration or data.
        RunFailed: the run failed after ``config.max_failures`` restarts.
    """
    # On the driver's node: the loss of any other must not take it along.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    work = Work(config, run, dataset_fingerprint, launched, mailbox)
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
    running = _InThread(trainer.fit)
    raised: list[str] = []
    try:
        while True:
            # Asked for before the events are taken, so that the last ones are not missed.
            alive = running.alive
            for event in ray.get(mailbox.take.remote()):
                if event["kind"] == "refused":
                    raise UserError(event["message"])
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
    outcome: Outcome = running.result.return_value
    return outcome


class _InThread:
    """A call in a thread of its own, where Ray leaves signals to the main thread."""

    def __init__(self, call: Any) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Any) -> None:
        try:
            self.result = call()
        except BaseException as error:
            self.error = error

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()


def _backend(config: TrainConfig) -> str | None:
    """NCCL refuses two ranks on one GPU, which fractions may give; None leaves it to Ray."""
    assert config.gpus_per_worker is not None  # settled when the config was made
    return "gloo" if 0 < config.gpus_per_worker < 1 else None


def _cause(error: BaseException) -> str:
    """What ended workers that could say nothing, e.g. because they were killed."""
    if isinstance(error, WorkerGroupError):
        return "\n".join(f"worker {rank}: {e}" for rank, e in error.worker_failures.items())
    return str(error).strip() or type(error).__name__
