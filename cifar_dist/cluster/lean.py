"""Ray's `TorchTrainer` with no more processes than a run has a use for."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from cifar_dist.cluster.controller import FixedNumber


class LeanTorchTrainer(TorchTrainer):
    """A `TorchTrainer` without the processes that a run has no use for.

    Each costs seconds of processor time when workers are to start.
    """

    unused: tuple[type[Any], ...] = (DatasetsCallback,)
    """Callbacks that are left out: each starts a process. This one hands out Ray Datasets."""

    def _initialize_and_run_controller(self, **controller: Any) -> Any:
        if not self.scaling_config.elasticity_enabled:
            controller["scaling_policy"] = FixedNumber(self.scaling_config)
        return super()._initialize_and_run_controller(**controller)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [each for each in callbacks if not isinstance(each, self.unused)]


class CleanedUpAfter(LeanTorchTrainer):
    """One whose driver gives back itself what a dead controller had reserved.

    Not for a trial: its driver is a process of the cluster's, which may die before the search does.
    """

    unused = (*LeanTorchTrainer.unused, PlacementGroupCleanerCallback)
