"""What workers do in tests besides training; Ray imports this module in them."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import ray.train

from cifar_dist.cluster.trainer import Work, train_worker
from cifar_dist.runs.metrics import Outcome


def recording_worker(work: Work) -> Outcome:
    """Train, and write a line for each image that the network is given: what, where, which pixels.

    A line: stage, epoch, global batch, rank, place in the rank's part, label, digest of the pixels.
    """
    from cifar_dist.data import datamodule
    from cifar_dist.training import fit

    rank = ray.train.get_context().get_world_rank()
    log = work.run.path / f"images-{rank}.txt"

    class Recording(datamodule.ImageDataModule):
        batches = 0
        counted_in = ("", -1)

        def ready(self, batch: datamodule.Batch) -> datamodule.Batch:
            batch = super().ready(batch)
            stage = self.trainer.state.stage.value
            if self.counted_in != (stage, self.trainer.current_epoch):
                self.counted_in, self.batches = (stage, self.trainer.current_epoch), 0
            with log.open("a") as lines:
                for place, (image, label) in enumerate(
                    zip(batch.images, batch.labels, strict=True)
                ):
                    digest = hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()
                    lines.write(
                        f"{stage} {self.trainer.current_epoch} {self.batches} {rank} {place} "
                        f"{int(label)} {digest}\n"
                    )
            self.batches += 1
            return batch

    fit.ImageDataModule = Recording
    return train_worker(work)


def raising_worker(work: Work) -> Outcome:
    """Rank 1 raises; rank 0 waits for it, as in a collective."""
    if ray.train.get_context().get_world_rank() == 1:
        raise ZeroDivisionError("the second worker divides by zero")
    threading.Event().wait()
    raise AssertionError


def hanging_worker(work: Work) -> Outcome:
    """Rank 1 raises while rank 0 is in a collective with it, and leaving the group waits for that.

    On a GPU NCCL's group does; gloo's notices that the other process is gone.
    """
    import torch
    import torch.distributed

    leave = torch.distributed.destroy_process_group

    def destroy() -> None:
        (work.run.path / "destroyed").touch()
        threading.Event().wait()
        leave()

    torch.distributed.destroy_process_group = destroy
    torch.distributed.barrier()
    if ray.train.get_context().get_world_rank() == 1:
        (work.run.path / "raised").touch()
        raise ZeroDivisionError("the second worker divides by zero")
    torch.distributed.all_reduce(torch.zeros(1))
    raise AssertionError


def leaving_worker(work: Work) -> Outcome:
    """Train, and note that the process group was left."""
    import torch.distributed

    leave = torch.distributed.destroy_process_group
    rank = ray.train.get_context().get_world_rank()

    def destroy() -> None:
        leave()
        (work.run.path / f"left-{rank}").touch()

    torch.distributed.destroy_process_group = destroy
    return train_worker(work)


def killed_worker(work: Work) -> Outcome | None:
    """Train, but the first time rank 1 is killed after the fifth step, once the fourth is saved."""
    from cifar_dist.training import checkpointing

    marker: Path = work.run.path / "killed"

    class Killed(checkpointing.RunCheckpointer):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            if trainer.global_rank == 1 and trainer.global_step == 5 and not marker.exists():
                marker.touch()
                while not work.run.checkpoint(1, 4).exists():  # rank 0 writes beside training
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)

    from cifar_dist.training import fit

    fit.RunCheckpointer = Killed
    return train_worker(work)


def misled_worker(work: Work) -> Outcome:
    """Train on a node whose data is not the driver's."""
    object.__setattr__(work, "dataset_fingerprint", "0" * 64)
    return train_worker(work)
