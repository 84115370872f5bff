"""torch's process group, set up by a controller that does not load torch itself."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.util import TrainingFramework

TIMEOUT_S = 1800
"""Of the group's collectives, as Ray's `TorchConfig` has it."""
SHUTDOWN_TIMEOUT_S = 30
ASK_TIMEOUT_S = 5
"""How long a worker may take to say whether its training has ended."""

_ended_well = False
"""In a worker's process: whether its training function has returned."""


def mark_ended_well() -> None:
    """Note, in a worker, that it takes part in no further collective."""
    global _ended_well
    _ended_well = True


@dataclass
class ProcessGroup(BackendConfig):
    """What Ray's `TorchConfig` is, without torch where it is unpickled.

    Ray's own makes the controller load torch, for which all workers wait: they are started behind
    it.
    """

    backend: str
    """``nccl`` or ``gloo``."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroupBackend

    @property
    def train_func_context(self) -> Any:
        # Asked for by the driver, for the workers.
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager

    @property
    def framework(self) -> Any:
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.backend, "init_method": "env", "timeout_s": TIMEOUT_S}


class _ProcessGroupBackend(Backend):
    """Runs in the controller; what needs torch, on the workers, is Ray's own."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, ProcessGroup)
        place = worker_group.execute_single(0, get_address_and_port)
        world_size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, backend_config.backend, rank, world_size, place
                )
                for rank in range(world_size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        # Ray calls this after a failure too, and kills the processes next. Where a rank has raised,
        # others may still be in a collective with it, and to leave the group would wait for that.
        with contextlib.suppress(GetTimeoutError):  # the processes end anyway
            ended = ray.get(worker_group.execute_async(_has_ended_well), timeout=ASK_TIMEOUT_S)
            if all(ended):
                left = worker_group.execute_async(_leave, len(worker_group))
                ray.get(left, timeout=SHUTDOWN_TIMEOUT_S)


def _join(backend: str, rank: int, world_size: int, place: tuple[str, int]) -> None:
    from ray.train.torch import config

    from cifar_dist.training.memory import threads_share_memory

    threads_share_memory()  # before Ray starts the one that trains
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place[0], str(place[1])
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, rank, world_size, "env://", TIMEOUT_S)


def _has_ended_well() -> bool:
    return _ended_well


def _leave(world_size: int) -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=world_size > 1)
