"""The resources that workers reserve, and the check that a cluster has them or will have them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from cifar_dist.cluster.ray_internals import autoscales
from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import UserError
from cifar_dist.events import Listener, Waiting

Resources = dict[str, float]

LOOK_S = 0.5
UNITS = 10_000
"""Ray counts resources in ten-thousandths, rounded: three times 0.1 is 0.3."""


def worker_resources(config: TrainConfig) -> Resources:
    """Return what one worker reserves."""
    reserved = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        reserved["GPU"] = config.gpus_per_worker
    return reserved


@dataclass(frozen=True)
class Flags:
    """Names of the flags for what is reserved, for messages."""

    workers: str = "--num-workers"
    cpus: str = "--cpus-per-worker"
    gpus: str = "--gpus-per-worker"


TRAIN_FLAGS = Flags()
TUNE_FLAGS = Flags("--workers-per-trial", "--cpus-per-trial", "--gpus-per-trial")


def room(each: Resources) -> int:
    """Return how many workers that reserve this much the cluster could hold if it were empty."""
    # Node by node, since a worker cannot span two: by the sum that `ray.cluster_resources` gives,
    # two nodes of one CPU would be a place for a worker of two CPUs.
    return sum(_fitting(node, each) for node in _nodes())


def have_resources(config: TrainConfig, listener: Listener, flags: Flags = TRAIN_FLAGS) -> None:
    """Check that the cluster can place the fewest workers that the run needs.

    One that can grow is asked to, and waited for as long as ``wait_for_resources`` says.

    Args:
        config: the run, or the settings of a trial.
        listener: is notified of the waiting.
        flags: how messages name what is reserved.

    Raises:
        UserError: it cannot, or not in time; the message says what is asked and what the cluster
            has.
    """
    # Checked here because Ray would wait for ever for what a cluster can never place, and print
    # nothing.
    workers, each = config.min_workers, worker_resources(config)
    try:
        refuse_unplaceable(workers, each, _nodes(), flags)
    except UserError as error:
        if not autoscales() or not config.wait_for_resources_s:
            raise
        _wait_for(workers, each, config, listener, str(error))


def _wait_for(
    workers: int, each: Resources, config: TrainConfig, listener: Listener, missing: str
) -> None:
    asked = f"{workers} x ({_displayed(each)})"
    listener(
        Waiting(
            f"waiting for the cluster to grow: needs {asked}, has room for {room(each)}; "
            f"at most {config.wait_for_resources} (--wait-for-resources)"
        )
    )
    # Only what waits makes a cluster grow. It need not be kept: nodes stay a while when idle.
    reserved = placement_group([each] * workers, strategy="PACK")
    try:
        until = time.monotonic() + config.wait_for_resources_s
        while not reserved.wait(LOOK_S):
            if time.monotonic() > until:
                raise UserError(
                    f"--wait-for-resources {config.wait_for_resources}: the cluster has not grown "
                    f"so far; {missing}"
                )
    finally:
        # Else the reservation would hold the very places that the workers need.
        remove_placement_group(reserved)


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
    has = " + ".join(_displayed(node, always=each) for node in nodes)
    raise UserError(
        f"{flags.workers} {workers}: needs {workers} x ({_displayed(each)}), and the cluster has "
        f"{has}, room for {fitting}; {_advice(each, nodes, fitting, flags)}"
    )


def _nodes() -> list[Resources]:
    # All that a node has, not what is free on it now: what others use is given back some day, so it
    # is a reason to wait and none to refuse.
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _fitting(node: Resources, each: Resources) -> int:
    return min(_places(name, node.get(name, 0.0), need) for name, need in each.items())


def _places(name: str, there: float, need: float) -> int:
    """Return how often a need fits into what a node has, as Ray counts it."""
    # At least one unit, since a smaller need would round to zero and be divided by.
    units = max(round(need * UNITS), 1)
    if name == "GPU" and need < 1:
        # A worker's part of a GPU is of one device, so the remainders of several make no place:
        # two GPUs hold two workers of 0.6 each, not three.
        return int(there) * (UNITS // units)
    return round(there * UNITS) // units


def _advice(each: Resources, nodes: list[Resources], fitting: int, flags: Flags) -> str:
    if "GPU" in each and not any(node.get("GPU") for node in nodes):
        return "omit --use-gpu, or name a cluster with GPUs in RAY_ADDRESS"
    if fitting:
        return f"use {flags.workers} {fitting}, or give each worker less with {flags.cpus}"
    return f"ask for less with {flags.cpus} or {flags.gpus}"


def _displayed(resources: Resources, always: Resources | None = None) -> str:
    names = ["CPU", "GPU"] if always and "GPU" in always else ["CPU"]
    names += ["GPU"] if "GPU" in resources and "GPU" not in names else []
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in names)
