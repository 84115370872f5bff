"""When a loss is no longer finite: the run stops at that step, or the step is undone."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from cifar_dist.errors import Diverged
from cifar_dist.events import Listener, ignore
from cifar_dist.model.classifier import Classifier
from cifar_dist.runs import RunDirectory
from cifar_dist.training.reading import Reading

STEPS_AHEAD = 8
"""How many steps may be given to a GPU before the loss of the first of them is read."""


class StopOnNonFinite(Callback):
    """Ends the run at the step whose loss is not finite.

    A GPU's losses are read as they arrive, at most `STEPS_AHEAD` steps late, and all of them before
    a checkpoint and at an epoch's end: to read each at once would make the device finish a step
    before the next is prepared. The step that is named, and what is saved, are the same.

    Raises:
        Diverged: on the rank that sees it.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._unread: deque[tuple[Reading, Where]] = deque()

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        self._unread.append((Reading(loss), Where.of(trainer)))
        self._read(at_most_unread=STEPS_AHEAD)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._read()
        # A gradient may be too large where the loss is not yet.
        names, weights = zip(*pl_module.named_parameters(), strict=True)
        finite = torch.stack([torch.isfinite(weight).all() for weight in weights]).tolist()
        if not all(finite):
            name = names[finite.index(False)]
            raise Diverged(self._message(f"{name} is not finite before {Where.of(trainer)}"))

    def _read(self, at_most_unread: int = 0) -> None:
        while self._unread and (len(self._unread) > at_most_unread or self._unread[0][0].arrived):
            reading, where = self._unread.popleft()
            if not math.isfinite(loss := reading.values()[0]):
                raise Diverged(self._message(f"the loss is {loss} at {where}"))

    def _message(self, what: str) -> str:
        checkpoints = self.run.checkpoints_newest_first()
        last = (
            f"the last good checkpoint is {checkpoints[0]}" if checkpoints else "no checkpoint yet"
        )
        return f"{what}; {last}; lower --lr, change --precision, or skip such updates"


class Where(NamedTuple):
    """A step that is under way; formatted only where it is shown."""

    step: int
    """1-based, since the run's start."""
    epoch: int
    """1-based."""
    lr: float

    @classmethod
    def of(cls, trainer: pl.Trainer) -> Where:
        """Return where a trainer is."""
        lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        return cls(trainer.global_step + 1, trainer.current_epoch + 1, lr)

    def __str__(self) -> str:
        return f"step {self.step} (epoch {self.epoch}, lr {self.lr:g})"


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
        self._skip = False
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
        self._skip = not bool(finite)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self._skip:
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
