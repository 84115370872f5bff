"""Lightning in the only process of a run, whatever a job's launcher left in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning_utilities.core.rank_zero import rank_zero_only

from cifar_dist.variables import variables_restored


class Alone(LightningEnvironment):
    """The environment of a single process.

    Lightning's own guess takes the variables of Slurm, torchrun, Kubeflow, LSF and MPI to mean that
    other processes take part: in an interactive job with ``SLURM_NTASKS=4``, or in a trial's
    process, nobody started any.
    """

    def __init__(self) -> None:
        super().__init__()
        # At its import Lightning reads it from RANK, LOCAL_RANK or SLURM_PROCID; on any other rank
        # than 0 it writes nothing.
        rank_zero_only.rank = 0  # type: ignore[attr-defined]

    @property
    def creates_processes_externally(self) -> bool:
        return False

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return 0

    def teardown(self) -> None:
        """Leave ``WORLD_SIZE`` alone, which Lightning would delete."""


@contextmanager
def only_given_settings() -> Iterator[None]:
    """Hide variables like ``PL_TRAINER_MAX_STEPS`` while this lasts.

    Lightning takes them as the trainer's settings, which a run's config would not show.
    """
    names = [name for name in os.environ if name.startswith("PL_TRAINER_")]
    with variables_restored(*names):
        for name in names:
            del os.environ[name]
        yield
