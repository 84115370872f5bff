"""Connecting to Ray, and seeing that it has what will be asked of it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import auto_init_hook, parameter
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cifar_dist.config import TrainConfig
from cifar_dist.errors import UserError
from cifar_dist.storage import AnyPath, StorePath

Resources = dict[str, float]

CONNECT_TIMEOUT_S = 5
LOOK_TIMEOUT_S = 60
"""How long nodes may take to say whether they see a folder."""


@contextmanager
def session(verbose: bool = False) -> Iterator[str]:
    """A connection to Ray; yields in words where to.

    A connection that is there already is used and left. Else the cluster that ``RAY_ADDRESS``
    names, or the one that was started on this machine, is joined; where there is none, one is
    started for as long as this lasts.

    Args:
        verbose: pass on what Ray and its workers print.

    Raises:
        UserError: the cluster that ``RAY_ADDRESS`` names cannot be reached.
    """
    if ray.is_initialized():
        yield "the Ray session of this process"
        return
    _check_answering(os.environ.get("RAY_ADDRESS", ""))
    # Without the dashboard a cluster of this machine starts in less time and memory. Joining
    # one ignores the option. Where Ray may talk, its clean-up actor wants the dashboard.
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _processes_left_out(log_monitor=not verbose):
            ray.init(
                include_dashboard=verbose,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _not_answering(os.environ.get("RAY_ADDRESS", ""), error) from None
    if threading.current_thread() is threading.main_thread():
        for each, handler in handlers.items():
            signal.signal(each, handler)  # Ray puts its own in their place
    if not verbose:
        for name in ("ray", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        nodes = len(_nodes())
        yield f"Ray, {nodes} node{'s' * (nodes > 1)}"
    finally:
        # Where an interruption left a thread of Ray's behind, its next call to Ray would start a
        # cluster of its own. (Set as RAY_ENABLE_AUTO_CONNECT=0 would, had Ray not been imported.)
        auto_init_hook.enable_auto_connect = False
        ray.shutdown()


@contextmanager
def _processes_left_out(log_monitor: bool) -> Iterator[None]:
    """Have a cluster that is started meanwhile do without processes that it has no use for.

    They are the autoscaler, which has no machines to add, and what passes on workers' output. Each
    takes a second of processor time to start, and interrupts training steps for as long as it
    lasts. Joining a cluster is not affected.
    """
    complete = parameter.RayParams
    without: dict[str, Any] = {"no_monitor": True}
    if log_monitor:
        without["include_log_monitor"] = False
    parameter.RayParams = functools.partial(complete, **without)
    try:
        yield
    finally:
        parameter.RayParams = complete


def started_here() -> bool:
    """Whether this process started the cluster that it is connected to."""
    node = ray._private.worker._global_node
    return node is not None and bool(node.is_head())


def _check_answering(address: str) -> None:
    """See that something listens at a ``HOST:PORT``; Ray itself would try for minutes.

    Raises:
        UserError: nothing does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "local", "auto", or none given
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise _not_answering(address, error) from None


def _not_answering(address: str, error: Exception) -> UserError:
    return UserError(
        f"RAY_ADDRESS {address}: no Ray cluster answers ({_first_line(error)}); "
        "start one with 'ray start --head', or unset RAY_ADDRESS"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def worker_resources(config: TrainConfig) -> Resources:
    """What one worker reserves."""
    reserved = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        reserved["GPU"] = config.gpus_per_worker
    return reserved


@dataclass(frozen=True)
class Flags:
    """The flags that say what is reserved, for messages."""

    workers: str = "--num-workers"
    cpus: str = "--cpus-per-worker"
    gpus: str = "--gpus-per-worker"


TRAIN_FLAGS = Flags()
TUNE_FLAGS = Flags("--workers-per-trial", "--cpus-per-trial", "--gpus-per-trial")


def room(each: Resources) -> int:
    """How many workers that reserve this much the cluster could hold if it were empty."""
    return sum(_fitting(node, each) for node in _nodes())


def check_resources(config: TrainConfig, flags: Flags = TRAIN_FLAGS) -> None:
    """See that the cluster can ever place the fewest workers that the run needs.

    Ray would wait for ever, and say nothing.

    Raises:
        UserError: it cannot; the message says what is asked and what the cluster has.
    """
    refuse_unplaceable(config.min_workers, worker_resources(config), _nodes(), flags)


def refuse_unplaceable(
    workers: int, each: Resources, nodes: list[Resources], flags: Flags = TRAIN_FLAGS
) -> None:
    """Raise unless so many workers fit on nodes with these resources, each on one node.

    Raises:
        UserError: they do not fit.
    """
    fitting = sum(_fitting(node, each) for node in nodes)
    if fitting >= workers:
        return
    has = " + ".join(_in_words(node, always=each) for node in nodes)
    raise UserError(
        f"{flags.workers} {workers}: needs {workers} x ({_in_words(each)}), and the cluster has "
        f"{has}, room for {fitting}; {_advice(each, nodes, fitting, flags)}"
    )


def check_shared(folder: AnyPath) -> None:
    """See that all nodes of the cluster see a run's folder.

    Args:
        folder: there on this node.

    Raises:
        UserError: one of them does not.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    others = [each for each in nodes if each != ray.get_runtime_context().get_node_id()]
    if isinstance(folder, StorePath) or not others:
        return
    mark = folder / f".seen-{uuid.uuid4().hex[:8]}"
    mark.touch()
    try:
        look = ray.remote(num_cpus=0)(_is_file)
        asked = {
            look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(str(mark)): nodes[node]
            for node in others
        }
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_TIMEOUT_S)
        for answer in answered:
            with contextlib.suppress(ray.exceptions.RayError):  # a node that has gone meanwhile
                if not ray.get(answer):
                    raise UserError(
                        f"--storage-path {folder.parent}: node {asked[answer]} does not see it; "
                        "name a folder that all nodes share, or an object store (s3://...)"
                    )
    finally:
        mark.unlink(missing_ok=True)


def _is_file(path: str) -> bool:
    return os.path.isfile(path)


def ray_storage(folder: AnyPath) -> dict[str, Any]:
    """A folder as Ray's ``RunConfig`` takes it."""
    if isinstance(folder, StorePath):
        return {"storage_path": folder.key, "storage_filesystem": folder.filesystem}
    return {"storage_path": str(folder)}


def _nodes() -> list[Resources]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _fitting(node: Resources, each: Resources) -> int:
    # A little more than nothing for the rounding of 3 x 0.1.
    return min(int(node.get(name, 0.0) / need + 1e-6) for name, need in each.items())


def _advice(each: Resources, nodes: list[Resources], fitting: int, flags: Flags) -> str:
    if "GPU" in each and not any(node.get("GPU") for node in nodes):
        return "leave out --use-gpu, or name a cluster with GPUs in RAY_ADDRESS"
    if fitting:
        return f"use {flags.workers} {fitting}, or give each worker less with {flags.cpus}"
    return f"ask for less with {flags.cpus} or {flags.gpus}"


def _in_words(resources: Resources, always: Resources | None = None) -> str:
    names = ["CPU", "GPU"] if always and "GPU" in always else ["CPU"]
    names += ["GPU"] if "GPU" in resources and "GPU" not in names else []
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in names)
