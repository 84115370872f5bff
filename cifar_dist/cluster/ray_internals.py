"""All of Ray's private names that the project uses, a function for each thing gained with them.

They are used with the versions of Ray that they were tested with. With any other version, and where
``CIFAR_DIST_PLAIN_RAY=1`` is set, each function falls back to the public API: results are the same
bits, runs start more slowly, and what a docstring names after "Lost without" is missing.
"""

# Ray's private modules are imported inside functions, so that this module loads with any version,
# and so is Ray Train, for which a process that only connects to a cluster would wait seconds.
# Therefore classes that extend Ray's are local; they are pickled by value.

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import AuthenticationError, GetTimeoutError

from cifar_dist.events import Order, WorkersLost

TESTED = ("2.60.",)
"""Beginnings of the versions of Ray that were tested."""
PLAIN_RAY = "CIFAR_DIST_PLAIN_RAY"
"""The environment variable that switches all of this off, in the driver."""

WAIT_FOR_NODES_S = 1
SAVE_BEFORE_RESIZE_S = 60
"""How long workers that are to be replaced by more or fewer may take to save a checkpoint."""
SHUTDOWN_TIMEOUT_S = 30
"""How long workers may take to leave their process group."""
ASK_TIMEOUT_S = 5
"""How long a worker may take to answer whether its training has ended."""

_driver_enabled: bool | None = None
"""In a process of the cluster's: what the driver decided, once `follow_driver` was called."""


def enabled() -> bool:
    """Return whether Ray's private names are used; the driver decides for all its processes."""
    if _driver_enabled is not None:
        return _driver_enabled
    if os.environ.get(PLAIN_RAY, "") not in ("", "0"):
        return False
    if ray.__version__.startswith(TESTED):
        return True
    _warn_untested(ray.__version__)
    return False


def follow_driver(enabled: bool) -> None:
    """Do as the driver does, in a process on whose node the environment may be another."""
    global _driver_enabled
    _driver_enabled = enabled


@functools.cache
def _warn_untested(version: str) -> None:
    # Without a handler of its own Python writes a warning to standard error.
    logging.getLogger("cifar_dist").warning(
        f"Ray {version}: not tested (tested: {', '.join(f'{each}x' for each in TESTED)}), so its "
        "public API alone is used; runs start more slowly, install a tested version to avoid that"
    )


@contextlib.contextmanager
def lean_cluster(log_monitor: bool) -> Iterator[None]:
    """Start a cluster, while this lasts, without autoscaler and, as asked, without log monitor.

    Joining a cluster is not affected.
    """
    if not enabled():
        yield
        return
    from ray._private import parameter

    # The autoscaler has no machines to add here, and without --verbose nobody reads what the log
    # monitor passes on. Each takes a second of processor time to start, and interrupts training
    # steps for as long as it lasts.
    complete = parameter.RayParams
    without: dict[str, Any] = {"no_monitor": True}
    if log_monitor:
        without["include_log_monitor"] = False
    parameter.RayParams = functools.partial(complete, **without)
    try:
        yield
    finally:
        parameter.RayParams = complete


def forbid_auto_connect() -> None:
    """Keep a thread that outlives its connection from starting a cluster with its next call.

    Lost without: only ``RAY_ENABLE_AUTO_CONNECT=0``, set before Ray is imported, does the same.
    """
    # An interruption may leave such a thread, which still waits for the run's end.
    if enabled():
        from ray._private import auto_init_hook

        auto_init_hook.enable_auto_connect = False


def started_here() -> bool:
    """Return whether this process is known to have started the cluster it is connected to.

    Lost without: the answer is no, but then nothing depends on it.
    """
    if not enabled():
        return False
    node = ray._private.worker._global_node
    return node is not None and bool(node.is_head())


def use_token() -> None:
    """Switch to token authentication where Ray finds a token and nothing says otherwise.

    Ray does so by itself for clusters that it finds, not for one whose address it is given.
    Lost without: ``RAY_AUTH_MODE=token`` has to be set; Ray reads it when it is imported.
    """
    if not enabled():
        return
    from ray._private.authentication import authentication_token_setup as setup

    setup.logger.disabled = True  # suppress its success message
    try:
        setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    except AuthenticationError:
        pass  # the file is missing that is named for it; a cluster that wants one will say so
    finally:
        setup.logger.disabled = False


def try_token(address: str) -> None:
    """Connect once, to have a wrong token refused in a moment; `ray.init` would try for 20 s.

    Raises:
        AuthenticationError: the cluster wants another token.
        ConnectionError, RuntimeError, RayError: anything else went wrong.
    """
    if enabled():
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        GcsClient(address=address)


def autoscales() -> bool:
    """Return whether nodes are added to the cluster that this process is connected to, on demand.

    Lost without: the answer is no, so runs that find too few resources are refused at once.
    """
    if not enabled() or started_here():
        return False
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.experimental.internal_kv import _internal_kv_get

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    reports = int(status.stats.autoscaler_version or 0) or _internal_kv_get(
        DEBUG_AUTOSCALING_STATUS
    )
    # A report alone proves nothing: the autoscaler of a plain `ray start` reports too, and adds no
    # nodes. There they carry no cloud's name. Nodes that Kubernetes made always carry one, but an
    # autoscaler that is switched off reports nothing. So both are asked for.
    nodes = [*status.active_nodes, *status.idle_nodes]
    return bool(reports) and any(node.instance_id for node in nodes)


def draining_nodes() -> set[str]:
    """Return the ids of nodes that the cluster is about to take away.

    Lost without: a node's notice of its end is missed, and steps since the last checkpoint with it.
    """
    if not enabled():
        return set()
    from ray._private import state

    return set(state.state.get_draining_nodes())


def reservation(trainer: Any) -> str | None:
    """Return the name under which an elastic run's controller asks for nodes, where it is known."""
    return f"train-{trainer.train_run_context.run_id}" if enabled() else None


def cancel_reservation(name: str) -> None:
    """Give back what an elastic run's controller had asked for before it was killed.

    Lost without: Ray remembers it for three minutes, in which a resumed run finds nothing free.

    Raises:
        ValueError, RayError: nobody remembers it.
    """
    if enabled():
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(coordinator.cancel_request.remote(name))


def watch(coordinator: Any, max_failures: int) -> Any:
    """Return a callback for Ray Train's controller that reports failures to the driver.

    It also has a checkpoint written before an elastic run changes its number of workers.

    Lost without: that checkpoint; whether a worker's process died or it raised; failures to place
    workers; and a pause between the controller's looks for nodes, which then take a whole CPU.
    """
    if not enabled():
        from cifar_dist.cluster.controller import ReportFailures

        return ReportFailures(coordinator, max_failures)
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class Watch(ControllerCallback):
        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            _on_state_update(coordinator, previous_state, current_state)

    return Watch()


def _on_state_update(coordinator: Any, previous: Any, current: Any) -> None:
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
    from ray.train.v2._internal.execution.controller import state

    from cifar_dist.cluster.controller import summarize_failure

    if current is previous:
        # Too few nodes for an elastic run: Ray looks again at once, without a pause.
        if isinstance(
            current, state.InitializingState | state.RestartingState | state.ReschedulingState
        ):
            time.sleep(WAIT_FOR_NODES_S)
    elif isinstance(current, state.RestartingState | state.ReschedulingState):
        error = current.training_failed_error
        message = summarize_failure(error, died=WorkerHealthCheckFailedError)
        coordinator.put.remote(WorkersLost(message))
    elif isinstance(current, state.ResizingState):
        # Ray stops all workers to change their number, and the steps since their last checkpoint
        # would be done again.
        number = ray.get(coordinator.request.remote(Order.SAVE))
        # Too late is no failure: the workers resume from the checkpoint before.
        ray.wait([coordinator.wait_completed.remote(number)], timeout=SAVE_BEFORE_RESIZE_S)


def torch_trainer(
    function: Callable[[], Any], backend: str, scaling: Any, run: Any, cleaned_up: bool
) -> Any:
    """Return a `TorchTrainer` that starts no process that a run has no use for.

    Each costs seconds of processor time when workers are to start.

    Args:
        function, scaling, run: as `TorchTrainer` takes them.
        backend: ``nccl`` or ``gloo``.
        cleaned_up: the driver itself gives back what a dead controller had reserved. Not in a
            trial: its driver is a process of the cluster's, which may die before the search does.
    """
    from ray.train.torch import TorchConfig, TorchTrainer

    settings = {"scaling_config": scaling, "run_config": run}
    if not enabled():
        return TorchTrainer(function, torch_config=TorchConfig(backend=backend), **settings)
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )

    # The first hands out Ray Datasets.
    unused = (DatasetsCallback, *([PlacementGroupCleanerCallback] if cleaned_up else []))

    class LeanTorchTrainer(TorchTrainer):
        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            if not self.scaling_config.elasticity_enabled:
                arguments["scaling_policy"] = _fixed_number(self.scaling_config)
            return super()._initialize_and_run_controller(**arguments)

        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()
            return [each for each in callbacks if not isinstance(each, unused)]

    return LeanTorchTrainer(function, torch_config=_process_group(backend), **settings)


def _fixed_number(scaling: Any) -> Any:
    """Return a policy that asks for workers by a placement group alone, always the same number."""
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    # Ray's own also asks a process that shares out nodes between elastic runs and Ray Datasets, and
    # waits seconds for it to start. Placement groups make a cluster scale up by themselves.
    class FixedNumber(FixedScalingPolicy):
        def after_controller_start(self, train_run_context: Any) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    return FixedNumber(scaling)


def _process_group(name: str) -> Any:
    """Return what Ray's `TorchConfig` is, without torch where it is unpickled."""
    # Ray's own makes the controller load torch before it starts the workers, which takes seconds.
    from ray.train.backend import Backend, BackendConfig
    from ray.train.v2._internal.util import TrainingFramework

    class ProcessGroupBackend(Backend):
        share_cuda_visible_devices = True

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            _join_all(worker_group, name)

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            _leave_all(worker_group)

    class ProcessGroup(BackendConfig):
        backend = name
        backend_cls = ProcessGroupBackend
        framework = TrainingFramework.TORCH

        @property
        def train_func_context(self) -> Any:
            # Called by the driver, for the workers.
            from ray.train.torch.config import TorchConfigContextManager

            return TorchConfigContextManager

    return ProcessGroup()


def _join_all(worker_group: Any, backend: str) -> None:
    from ray.train._internal.utils import get_address_and_port

    place = worker_group.execute_single(0, get_address_and_port)
    # All at once: each rank blocks until the others have joined.
    size, join = len(worker_group), worker_group.execute_single_async
    ray.get([join(rank, _join, backend, rank, size, place) for rank in range(size)])


def _leave_all(worker_group: Any) -> None:
    from cifar_dist.cluster.controller import has_ended_well

    # Ray calls this after a failure too, and kills the processes next. Where a rank has raised,
    # others may still be in a collective with it, and to leave the group would wait for that.
    with contextlib.suppress(GetTimeoutError):  # the processes end anyway
        ended = ray.get(worker_group.execute_async(has_ended_well), timeout=ASK_TIMEOUT_S)
        if all(ended):
            left = worker_group.execute_async(_leave, len(worker_group))
            ray.get(left, timeout=SHUTDOWN_TIMEOUT_S)


def _join(backend: str, rank: int, world_size: int, place: tuple[str, int]) -> None:
    from ray.train.torch import config

    from cifar_dist.training.memory import threads_share_memory

    threads_share_memory()  # before Ray starts the one that trains
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place[0], str(place[1])
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, rank, world_size, "env://")


def _leave(world_size: int) -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=world_size > 1)
