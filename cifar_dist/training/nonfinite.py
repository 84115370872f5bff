"""When a loss is no longer finite: the run stops at that step, or the step is undone."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from cifar_dist.errors import Diverged
from cifar_dist.events import Listener, ignore
from cifar_dist.model.classifier import Classifier
from cifar_dist.runs import RunDirectory


class StopOnNonFinite(Callback):
    """Ends the run at the step whose loss is not finite.

    On a GPU the loss is looked at when the next step begins, at a checkpoint or at the epoch's
    end, whichever comes first: to look at once would make the device finish each step before the
    next is prepared. The step that is named, and what is saved, are the same.

    Raises:
        Diverged: on the rank that sees it.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._unseen: tuple[_Copy, str] | None = None

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        self._look()
        self._unseen = (_Copy(loss.detach()), _where(trainer))
        if loss.device.type == "cpu":
            self._look()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look()
        # A gradient may be too large where the loss is not yet.
        for name, weight in pl_module.named_parameters():
            if not bool(torch.isfinite(weight).all()):
                raise Diverged(self._message(f"{name} is not finite before {_where(trainer)}"))

    def _look(self) -> None:
        if self._unseen is None:
            return
        (copy, where), self._unseen = self._unseen, None
        if not math.isfinite(loss := copy.value()):
            raise Diverged(self._message(f"the loss is {loss} at {where}"))

    def _message(self, what: str) -> str:
        checkpoints = self.run.checkpoints_newest_first()
        last = (
            f"the last good checkpoint is {checkpoints[0]}" if checkpoints else "no checkpoint yet"
        )
        return f"{what}; {last}; lower --lr, change --precision, or leave such updates out"


class _Copy:
    """A number on its way to the CPU; nothing waits for it before its value is asked for."""

    def __init__(self, number: Tensor) -> None:
        self._number = number
        self._arrived: torch.cuda.Event | None = None
        if number.device.type == "cuda":
            self._number = torch.empty_like(number, device="cpu", pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def value(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._number)


def _where(trainer: pl.Trainer) -> str:
    """Step and epoch (both 1-based) that are under way, and the learning rate."""
    lr = float(trainer.optimizers[0].param_groups[0]["lr"])
    return f"step {trainer.global_step + 1} (epoch {trainer.current_epoch + 1}, lr {lr:g})"


class SkipNonFinite(Callback):
    """Undoes a step whose loss is not finite on any rank: no update, no statistics, no count.

    All ranks agree before the update, which makes a GPU wait at every step.

    Args:
        listener: told at each epoch's end of what was skipped in it.
    """

    def __init__(self, listener: Listener = ignore) -> None:
        self.listener = listener
        self.skipped = 0
        """Steps since the run's start."""
        self._told = 0
        self.skipping = False
        """Whether the last step was."""
        self._before: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "told": self._told}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
        self._told = state_dict["told"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._before = [each.detach().clone() for each in _moving(pl_module)]

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        finite = torch.isfinite(loss.detach()).to(torch.int32)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        self.skipping = not bool(finite)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self.skipping:
            return
        self.skipped += 1
        # An optimizer leaves alone what has no gradient: weights, and its own averages.
        for weight in pl_module.parameters():
            weight.grad = None
        with torch.no_grad():
            for value, before in zip(_moving(pl_module), self._before, strict=True):
                value.copy_(before)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if new := self.skipped - self._told:
            self._told = self.skipped
            said = (
                f"epoch {trainer.current_epoch + 1}: {new} updates left out, their loss not finite"
            )
            self.listener({"kind": "warning", "message": said})


def _moving(module: pl.LightningModule) -> list[Tensor]:
    """What a forward pass changes: statistics of batch normalisation, and what was counted."""
    assert isinstance(module, Classifier)
    return [*module.network.buffers(), *module.totals_of("train").state().values()]
