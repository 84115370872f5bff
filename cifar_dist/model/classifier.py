"""The LightningModule: loss and metrics of a network in training."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.datamodule import PADDING, Batch
from cifar_dist.model.optim import optimizer_and_schedule


class Totals(nn.Module):
    """Loss, accuracy and number of images so far, as sums and counts of this rank.

    Images with label `PADDING` count for nothing. The sums stay on the device: nothing waits for it
    before `compute` or `running` is asked.
    """

    loss_sum: Tensor
    correct: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("loss_sum", "correct", "images"):
            # In float32 a sum over an epoch would round; float64 also counts exactly.
            # Not part of the state: counts differ between ranks, and loading would give all those
            # of rank 0. `RunCheckpointer` saves each rank's.
            self.register_buffer(name, torch.zeros((), dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def update(
        self, loss_sum: Tensor, logits: Tensor, labels: Tensor, images: Tensor | int
    ) -> None:
        """Add a rank's batch.

        Args:
            loss_sum: sum of the losses of the images that count.
            logits: ``[n, classes]``
            labels: ``[n]``
            images: how many of them count.
        """
        self.loss_sum.add_(loss_sum)
        self.correct.add_((logits.argmax(1) == labels).sum())  # no class has PADDING's number
        self.images.add_(images)

    def compute(self) -> dict[str, float]:
        """Return ``loss`` and ``accuracy`` as means over the ``images`` of all ranks, and reset.

        A collective. Where no image was counted, the means are not a number.
        """
        sums = torch.stack([self.loss_sum, self.correct, self.images])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # Gathered and added in the order of ranks: how an all-reduce orders its sums is open.
            ranks = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
            dist.all_gather(ranks, sums)
            sums = torch.stack(ranks).sum(0)
        self.reset()
        loss_sum, correct, images = sums.tolist()
        if images == 0:
            return {"loss": math.nan, "accuracy": math.nan, "images": 0}
        return {"loss": loss_sum / images, "accuracy": correct / images, "images": int(images)}

    def running(self) -> Tensor:
        """Return the accuracy over this rank's images so far, on the device; no collective."""
        return self.correct / self.images

    def state(self) -> dict[str, Tensor]:
        """Return this rank's sums and counts by name, as they are: live tensors."""
        return dict(self.named_buffers())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from sums and counts as `state` gives them."""
        for name, value in self.state().items():
            value.copy_(state[name])

    def reset(self) -> None:
        """Forget what was counted."""
        for value in self.state().values():
            value.zero_()


class Classifier(pl.LightningModule):
    """A network trained by cross-entropy.

    What it measures is in ``totals``, by stage (``train``, ``val``, ``test``); it logs nothing
    by itself.

    With ``ema`` it holds a second network, whose weights are the average of the first one's (see
    `AverageWeights`); both are in its state, so a checkpoint has both.

    Args:
        network: from ``[B, 3, H, W]`` images to ``[B, classes]`` logits.
        config: loss, optimizer, schedule, average.
        steps_per_epoch: optimizer steps in an epoch, for the schedule.
    """

    def __init__(self, network: nn.Module, config: TrainConfig, steps_per_epoch: int) -> None:
        super().__init__()
        self.network = network
        # Its weights take no gradients: DDP raises where a weight that takes them gets none.
        self.average = copy.deepcopy(network).requires_grad_(False) if config.ema else None
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.tested: dict[str, float] = {}
        self.totals = nn.ModuleDict(
            {f"{stage}_totals": Totals() for stage in ("train", "val", "test")}
        )

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the hook that it calls some forty times a step, and torch looks each time
        # whether a name is a parameter's or a module's.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated, tested and kept: the average where there is one."""
        return self.network if self.average is None else self.average

    def totals_of(self, stage: str) -> Totals:
        """Return the totals of ``train``, ``val`` or ``test``."""
        totals = self.totals[f"{stage}_totals"]
        assert isinstance(totals, Totals)
        return totals

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.network(batch.images)
        loss_sum = F.cross_entropy(
            logits, batch.labels, reduction="sum", label_smoothing=self.config.label_smoothing
        )
        # Training batches have no padding: the count is a plain number, and no mask is computed.
        self.totals_of("train").update(loss_sum, logits, batch.labels, len(batch.labels))
        # DDP averages gradients over ranks. Ranks' parts may differ in size, so each divides
        # by the global size and undoes the average: the sum is the global batch's mean loss.
        return loss_sum * (self.trainer.world_size / batch.global_size)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        # Not later: when Trainer.test returns, all is on the CPU, where NCCL reduces nothing.
        self.tested = self.totals_of("test").compute()

    def _evaluate(self, stage: str, batch: Batch) -> Tensor:
        logits: Tensor = self.evaluated(batch.images)
        loss_sum = F.cross_entropy(logits, batch.labels, reduction="sum", ignore_index=PADDING)
        # A sum that stays on the device. torchmetrics' ignore_index selects by a boolean mask
        # instead, which makes a GPU wait twice a step.
        images = (batch.labels != PADDING).sum()
        self.totals_of(stage).update(loss_sum, logits, batch.labels, images)
        return logits

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return optimizer_and_schedule(self.network, self.config, self.steps_per_epoch)
