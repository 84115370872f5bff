"""The exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cifar_dist.model.classifier import Classifier


class AverageWeights(Callback):
    """Callback that moves the averaged network towards the trained one after each step.

    ``average = d * average + (1 - d) * weights``. After ``n`` updates ``d`` is
    ``min(decay, (1 + n) / (10 + n))``, as in TensorFlow's ExponentialMovingAverage: with a fixed
    decay the random weights of the start would weigh on a short run's result, while here the
    average spans at most about a ninth of the steps so far.

    The running means and variances of batch normalisation are averaged likewise, since those of
    the trained network describe other activations than the averaged weights produce. Measuring
    them anew, as `torch.optim.swa_utils.update_bn` does, would take another pass over the training
    images for each validation. Each rank averages its own; `AverageBatchNorm` takes their mean.

    A step that is skipped (see `SkipNonFinite`) counts as one that left the weights unchanged:
    which steps are, the device alone knows at the time.

    Not Lightning's WeightAveraging: in 2.6 it makes its average before the module moves to the GPU,
    so each step would copy all weights to the CPU and wait for them.

    Args:
        decay: above 0, below 1.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        """Steps since the run's start that the average has followed."""
        self._pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._counters: list[tuple[Tensor, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not earlier: moving a module to a device replaces its buffers.
        assert isinstance(pl_module, Classifier)
        assert pl_module.average is not None
        pairs = list(zip(_state(pl_module.average), _state(pl_module.network), strict=True))
        # The update takes a whole list by the type of its first tensor, and lerp knows no whole
        # numbers: one counter among the weights would raise, so counters are kept apart.
        moving = [pair for pair in pairs if pair[0].is_floating_point()]
        self._pairs = [mine for mine, _ in moving], [weights for _, weights in moving]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(*self._pairs, self.updates)
        self.updates += 1

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for mine, counter in self._counters:  # batches that batch normalisation has seen
            mine.copy_(counter)


def _state(network: nn.Module) -> list[Tensor]:
    """Return a network's parameters and buffers, always in the same order."""
    # Detached tensors share the parameters' memory, so that lists made at the start serve every
    # step.
    return [*(each.detach() for each in network.parameters()), *network.buffers()]
