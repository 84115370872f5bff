"""Ray's `TorchTrainer` with no more processes than a run has a use for."""

from __future__ import annotations

from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    get_env_vars_to_propagate,
)

from cifar_dist.cluster.controller import FixedNumber, TrainController
from cifar_dist.cluster.session import started_here


class LeanTorchTrainer(TorchTrainer):
    """A `TorchTrainer` without the processes that a run has no use for.

    Each costs seconds of processor time when workers are to start.
    """

    unused: tuple[type[Any], ...] = (DatasetsCallback,)
    """Callbacks that are left out: each starts a process. This one hands out Ray Datasets."""

    def _initialize_and_run_controller(self, **what: Any) -> Any:
        if not self.scaling_config.elasticity_enabled:
            what["scaling_policy"] = FixedNumber(self.scaling_config)
        if not started_here():
            return super()._initialize_and_run_controller(**what)
        # Ray gives it the driver's variables by a runtime environment, for which a process has to
        # be started. Here it takes one that waits.
        environment = {
            RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: (
                DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE
            ),
            **get_env_vars_to_propagate(),
        }
        label = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        controller = ray.remote(num_cpus=0, label_selector=label)(TrainController)
        running: Any = controller.remote(environment, **what)
        ray.get(running.run.remote())
        return ray.get(running.get_result.remote())

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [each for each in callbacks if not isinstance(each, self.unused)]


class CleanedUpAfter(LeanTorchTrainer):
    """One whose driver gives back itself what a dead controller had reserved.

    Not for a trial: its driver is a process of the cluster's, which may die before the search does.
    """

    unused = (*LeanTorchTrainer.unused, PlacementGroupCleanerCallback)
