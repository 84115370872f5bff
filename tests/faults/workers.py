"""What workers do in the faults suite besides training; Ray imports this module in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from cifar_dist.cluster.trainer import Work, train_worker
from cifar_dist.runs.metrics import Outcome


def counting_worker(work: Work) -> Outcome | None:
    """Train, and count how often each image was trained on in each epoch.

    The counts are part of checkpoints, as the weights are: what they say at the end is what went
    into the weights. Rank 0 writes them to ``images.json``: by epoch, by count, how many images.
    """
    import torch

    from cifar_dist.data.stores import HostImages, Part
    from cifar_dist.training import checkpointing, fit

    batches = HostImages.batches
    given: list[Any] = []

    def noting(self: HostImages, parts: Iterable[Part]) -> Iterator[torch.Tensor]:
        def noted() -> Iterator[Part]:
            for numbers, on_device in parts:
                given[:] = [numbers]
                yield numbers, on_device

        return batches(self, noted())

    HostImages.batches = noting

    class Counting(checkpointing.RunCheckpointer):
        counts = torch.zeros(work.config.max_epochs, 2_000, dtype=torch.int64)

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.counts[trainer.current_epoch, torch.from_numpy(given[0])] += 1
            super().on_train_batch_end(trainer, *args)

        def rank_state(self, pl_module: Any) -> dict[str, Any]:
            return {**super().rank_state(pl_module), "counts": self.counts}

        def restore_rank(self, trainer: Any, pl_module: Any, ranks: list[dict[str, Any]]) -> None:
            super().restore_rank(trainer, pl_module, ranks)
            mine = ranks if trainer.global_rank == 0 else []
            self.counts = sum((each["counts"] for each in mine), torch.zeros_like(self.counts))

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            # Killed between its last checkpoint and its end, a run resumes without a step.
            counts = sum((each["counts"] for each in self.unrestored), self.counts)
            if trainer.world_size > 1 and not self.unrestored:
                torch.distributed.all_reduce(counts)
            if trainer.is_global_zero:
                by_count = [
                    dict(
                        zip(
                            *map(torch.Tensor.tolist, epoch.unique(return_counts=True)), strict=True
                        )
                    )
                    for epoch in counts
                ]
                (work.run.path / "images.json").write_text(json.dumps(by_count))

    fit.RunCheckpointer = Counting
    return train_worker(work)
