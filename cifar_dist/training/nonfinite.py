"""When a loss is no longer finite: the run stops at that step, or the step is undone."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from cifar_dist.errors import Diverged, RunFailed
from cifar_dist.events import Listener, Warned, ignore
from cifar_dist.model.classifier import Classifier
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.training.reading import Reading
from cifar_dist.training.writer import BackgroundWriter

STEPS_AHEAD = 8
"""How many steps may be given to a GPU before the loss of the first of them is read."""


class StopOnNonFinite(Callback):
    """Callback that ends the run at the step whose loss is not finite.

    A GPU's losses are read as they arrive, at most `STEPS_AHEAD` steps late, and all of them before
    a checkpoint and at an epoch's end: to read each at once would make the device finish a step
    before the next is prepared. The step that is named, and what is saved, are the same.

    Args:
        run: whose last good checkpoint is named.
        writer: what writes it.

    Raises:
        Diverged: on the rank that sees it.
    """

    def __init__(self, run: RunDirectory, writer: BackgroundWriter) -> None:
        self.run = run
        self.writer = writer
        self._unread: deque[tuple[Reading, Where]] = deque()

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        # The place is noted now: when the loss is read the trainer may be some steps ahead.
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
        # One transfer for all weights: to ask for each would make the device wait each time.
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
        # The last good checkpoint may still be on its way to the disk. That it cannot be written
        # would be a second error: an older one is named then.
        with contextlib.suppress(RunFailed):
            self.writer.wait()
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
    """Callback that undoes a step that must not be learned from: update, statistics, counts.

    Without a gradient scaler that is a step whose loss is not finite on any rank, where
    ``skip_losses`` says so. With one (``16-mixed``) it is each step that the scaler skips, for
    either value: gradients in float16 may overflow where the loss is finite, and a loss that is
    not finite gives gradients that are not. They stay for the scaler to find: it raises where
    there are none.

    Nothing here waits for the device within an epoch: what was found stays there as a number, which
    fused optimizers read themselves, and is added up there.

    Args:
        listener: notified at each epoch's end of what was skipped in it.
        skip_losses: whether a loss that is not finite is skipped, not the end of the run.
    """

    def __init__(self, listener: Listener = ignore, skip_losses: bool = True) -> None:
        self.listener = listener
        self.skip_losses = skip_losses
        self._count: Tensor | int = 0
        self._reported = 0
        self._scale: Tensor | None = None
        self._found: Tensor | None = None
        self._before: list[Tensor] = []

    @property
    def skipped(self) -> int:
        """Steps since the run's start; reading it waits for the device."""
        return int(self._count)

    def state_dict(self) -> dict[str, Any]:
        # ``told`` is the key in checkpoints of earlier versions, from which a run may resume.
        return {"skipped": self.skipped, "told": self._reported}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._count = state_dict["skipped"]
        self._reported = state_dict["told"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            _make_momentum(optimizer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Copied before the forward pass, which changes statistics before the loss is known.
        self._before = [_flat(group) for group in _moving(pl_module)]
        if (scaler := _scaler(trainer)) is not None:
            self._scale = _scale_of(scaler, pl_module.device)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        if not self.skip_losses or _scaler(trainer) is not None:
            return
        found = (~torch.isfinite(loss.detach())).float()
        if trainer.world_size > 1:
            # All ranks skip the same steps: a rank that updated alone would go its own way from
            # there.
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        self._found = found

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._found is None:
            return
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # Fused: it leaves weights and its own averages alone where this is 1, on the device.
            optimizer.found_inf = self._found  # type: ignore[attr-defined]
        elif bool(self._found):
            # Any other optimizer leaves alone what has no gradient.
            for weight in pl_module.parameters():
                weight.grad = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        found, self._found = self._found, None
        if (scaler := _scaler(trainer)) is not None:
            # A scaler lowers its scale where it has skipped, and nowhere else.
            assert self._scale is not None  # since the step began
            now = _scale_of(scaler, pl_module.device)
            # A scale of 0 cannot be lowered any further, and skips every step.
            found = ((now < self._scale) | (now == 0)).float()
        if found is None:
            return
        for optimizer in trainer.optimizers:
            optimizer.__dict__.pop("found_inf", None)
        with torch.no_grad():
            for group, before in zip(_moving(pl_module), self._before, strict=True):
                # Chosen on the device: branching on the number here would wait for it.
                kept = torch.where(found > 0, before, _flat(group))
                parts = kept.split([each.numel() for each in group])
                views = [part.view_as(each) for each, part in zip(group, parts, strict=True)]
                torch._foreach_copy_(group, views)
        self._before = []
        self._count = self._count + found.long()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        skipped = self.skipped
        if new := skipped - self._reported:
            self._reported = skipped
            what = "loss" if _scaler(trainer) is None else "loss or a gradient"
            message = (
                f"epoch {trainer.current_epoch + 1}: {new} updates skipped, their {what} not finite"
            )
            self.listener(Warned(message))

    def active(self, trainer: pl.Trainer) -> bool:
        """Return whether a step may be skipped; where not, this callback has no use."""
        return self.skip_losses or _scaler(trainer) is not None


def _scaler(trainer: pl.Trainer) -> torch.amp.GradScaler | None:
    return getattr(trainer.precision_plugin, "scaler", None)


def _scale_of(scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
    """Return a copy of the scale, on the device; `GradScaler.get_scale` would wait for it."""
    if scaler._scale is None:  # it makes it at the first step
        return torch.full((), scaler.get_scale(), device=device)
    return scaler._scale.clone()


def _make_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give each weight a momentum of zero, which the first update turns into its gradient.

    torch's fused SGD allocates momentum at its first step and fills it in the update: were that
    one skipped, later steps would continue from whatever was in that memory. Other optimizers make
    their state as a whole, and would find it begun.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        for weight in group["params"]:
            state = optimizer.state[weight]
            if group.get("momentum") and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(
                    weight, memory_format=torch.preserve_format
                )


def _moving(module: pl.LightningModule) -> list[list[Tensor]]:
    """Return what a forward pass changes, by type of number.

    That is the statistics of batch normalisation, and what was counted.
    """
    assert isinstance(module, Classifier)
    groups: dict[torch.dtype, list[Tensor]] = {}
    for each in (*module.network.buffers(), *module.totals_of("train").state().values()):
        groups.setdefault(each.dtype, []).append(each)
    return list(groups.values())


def _flat(tensors: list[Tensor]) -> Tensor:
    """Return a copy in one piece: one operation in place of one for each."""
    return torch.cat([each.detach().reshape(-1) for each in tensors])
