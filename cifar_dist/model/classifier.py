"""The LightningModule: loss, metrics, optimizer, schedule."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from cifar_dist.config import TrainConfig
from cifar_dist.data.datamodule import PADDING, Batch

SGD_MOMENTUM = 0.9
DEFAULT_RISE = 0.3
"""Share of a cycle in which the learning rate rises, where `warmup_epochs` is not set: torch's."""
RISE_FROM = 25.0
"""What a cycle's highest learning rate is divided by for its first one: torch's default."""


class Totals(nn.Module):
    """Loss, accuracy and number of images so far, as sums and counts over all ranks.

    Images with label `PADDING` count for nothing.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # Checks of the values' range would make the device wait at every step. Not MeanMetric:
        # with that check off, torchmetrics 1.9 takes every weight for 1.
        self.loss = SumMetric(nan_strategy="disable")
        self.accuracy = MulticlassAccuracy(
            num_classes, average="micro", ignore_index=PADDING, validate_args=False
        )
        self.images = SumMetric(nan_strategy="disable")
        for metric in (self.loss, self.images):
            # In float32 a sum over an epoch would round; not every accelerator has float64.
            metric.set_dtype(torch.float64)

    def update(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a rank's batch.

        Args:
            loss_sum: sum of the losses of the images that count.
            logits: ``[n, num_classes]``
            labels: ``[n]``
        """
        self.loss.update(loss_sum.detach())
        self.accuracy.update(logits.detach(), labels)
        self.images.update((labels != PADDING).sum())

    def compute(self) -> dict[str, float]:
        """``loss`` and ``accuracy`` as means over ``images`` images; a collective, then reset.

        Where no image was counted, the means are not a number.
        """
        images = int(self.images.compute())
        if images == 0:
            self.reset()
            return {"loss": math.nan, "accuracy": math.nan, "images": 0}
        # Accuracy is divided in float32: the whole number of right images gives it exactly.
        right = round(float(self.accuracy.compute()) * images)
        loss_sum = float(self.loss.compute())
        self.reset()
        return {"loss": loss_sum / images, "accuracy": right / images, "images": images}

    def accuracy_here(self) -> float:
        """Accuracy over this rank's images so far; no collective."""
        correct, wrong = (torch.as_tensor(s).sum() for s in (self.accuracy.tp, self.accuracy.fn))
        return float(correct / (correct + wrong))

    def state(self) -> dict[str, Tensor]:
        """This rank's sums and counts by name, as they are."""
        return {
            f"{name}.{key}": torch.as_tensor(value)
            for name, metric in self._metrics()
            for key, value in metric.metric_state.items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from sums and counts as `state` gives them."""
        with torch.no_grad():
            for name, value in self.state().items():
                value.copy_(state[name])

    def reset(self) -> None:
        """Forget what was counted."""
        for _, metric in self._metrics():
            metric.reset()

    def _metrics(self) -> list[tuple[str, Metric]]:
        return [("loss", self.loss), ("accuracy", self.accuracy), ("images", self.images)]


class Classifier(pl.LightningModule):
    """A network trained by cross-entropy.

    What it measures is in ``totals``, by stage (``train``, ``val``, ``test``); it logs nothing
    by itself.

    With ``ema`` it holds a second network, whose weights are the average of the first one's (see
    `AverageWeights`); both are in its state, so a checkpoint has both.

    Args:
        network: from ``[B, 3, H, W]`` images to ``[B, num_classes]`` logits.
        config: loss, optimizer, schedule, average.
        num_classes: the network's outputs.
        steps_per_epoch: optimizer steps in an epoch, for schedules by step.
    """

    def __init__(
        self, network: nn.Module, config: TrainConfig, num_classes: int, steps_per_epoch: int
    ) -> None:
        super().__init__()
        self.network = network
        self.average = copy.deepcopy(network).requires_grad_(False) if config.ema else None
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.tested: dict[str, float] = {}
        self.totals = nn.ModuleDict(
            {f"{stage}_totals": Totals(num_classes) for stage in ("train", "val", "test")}
        )

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated, tested and kept: the average where there is one."""
        return self.network if self.average is None else self.average

    def totals_of(self, stage: str) -> Totals:
        """What was counted in ``train``, ``val`` or ``test``."""
        totals = self.totals[f"{stage}_totals"]
        assert isinstance(totals, Totals)
        return totals

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.network(batch.images)
        loss_sum = F.cross_entropy(
            logits, batch.labels, reduction="sum", label_smoothing=self.config.label_smoothing
        )
        self.totals_of("train").update(loss_sum, logits, batch.labels)
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
        self.totals_of(stage).update(loss_sum, logits, batch.labels)
        return logits

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self._optimizer()
        schedule: Any
        if self.config.schedule == "onecycle":
            schedule = self._onecycle(optimizer)
            interval = "step"
        else:
            schedule = torch.optim.lr_scheduler.StepLR(
                optimizer, self.config.step_size, self.config.gamma
            )
            interval = "epoch"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": interval},
        }

    def _onecycle(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.OneCycleLR:
        config = self.config
        rise = DEFAULT_RISE
        if config.warmup_epochs is not None:
            # Below two steps there is nothing to rise over, and at one torch divides by zero.
            steps = config.warmup_epochs * self.steps_per_epoch
            rise = config.warmup_epochs / config.max_epochs if steps >= 2 else 0.0
        end = config.final_lr_factor
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=config.lr,
            total_steps=config.max_epochs * self.steps_per_epoch,
            pct_start=rise,
            anneal_strategy="cos" if config.anneal == "cosine" else "linear",
            div_factor=RISE_FROM,
            final_div_factor=1 / (RISE_FROM * end) if end else math.inf,
        )

    def _optimizer(self) -> torch.optim.Optimizer:
        lr, decay = self.config.lr, self.config.weight_decay
        parameters: Any = self.network.parameters()
        if not self.config.decay_norm_bias:
            parameters = decay_groups(self.network)
        # Fused: one pass over the weights in place of a dozen, on the CPU too.
        if self.config.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, lr, momentum=SGD_MOMENTUM, weight_decay=decay, nesterov=True, fused=True
            )
        return torch.optim.AdamW(parameters, lr, weight_decay=decay, fused=True)


def decay_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Return a network's parameters as two groups of an optimizer, the second without weight decay.

    Without decay are vectors and scalars: biases, and the scales and offsets of normalisation
    layers. A network that lacks either kind has one group.
    """
    decayed = [each for each in network.parameters() if each.ndim > 1]
    others = [each for each in network.parameters() if each.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
