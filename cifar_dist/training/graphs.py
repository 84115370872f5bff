"""CUDA graphs of the network's forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from cifar_dist.data.datamodule import Batch, ImageDataModule, TrainBatches
from cifar_dist.data.order import batch_bounds, rank_slice
from cifar_dist.errors import UserError
from cifar_dist.model.classifier import Classifier


class ReplayGraphs(Callback):
    """Callback that replays the network's passes over full batches from CUDA graphs.

    A training step of ResNet-18 gives a GPU several hundred kernels one by one, and where the host
    takes longer for that than the GPU for the kernels, the GPU waits. A graph gives it all of them
    at once: the same kernels on the same memory, captured once before the first step.

    An epoch's smaller last batch, validation and test run as without. A network whose passes read
    a value from the device, or branch on one, cannot be captured.

    Gradients lie in the graphs' own memory: a second backward pass before the optimizer's step
    would overwrite those of the first, not add to them.

    Raises:
        UserError: the network cannot be captured.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        network, images = pl_module.network, _full_batch(trainer)
        with _left_as_it_was(network, pl_module.device), trainer.precision_plugin.forward_context():
            try:
                graphed = torch.cuda.make_graphed_callables(_Passes(network), (images,))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"--cuda-graphs: the network cannot be captured, {reason}; use off"
                ) from error
        replay_full_batches(network, graphed, images.shape)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release(pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._release(pl_module)

    def _release(self, pl_module: pl.LightningModule) -> None:
        """Give the network its own forward back, and the graphs' memory to the device."""
        assert isinstance(pl_module, Classifier)
        pl_module.network.__dict__.pop("forward", None)


def replay_full_batches(network: nn.Module, graphed: Callable[..., Any], shape: torch.Size) -> None:
    """Have a network's training passes over images of one shape go to ``graphed``."""
    own = network.forward

    def forward(images: Tensor) -> Tensor:
        full = network.training and images.shape == shape and torch.is_grad_enabled()
        logits: Tensor = (graphed if full else own)(images)
        return logits

    network.forward = forward


class _Passes(nn.Module):
    """A module of its own around a network: what is captured replaces this one's forward."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return self.network(images)


def _full_batch(trainer: pl.Trainer) -> Tensor:
    """Return images as a full batch gives them to this rank's network; what they show is open."""
    datamodule, loader = trainer.datamodule, trainer.train_dataloader  # type: ignore[attr-defined]
    assert isinstance(datamodule, ImageDataModule)
    assert isinstance(loader, TrainBatches)
    first = int(batch_bounds(len(loader.members), loader.batch_size)[1])
    mine = rank_slice(first, loader.shard.rank, loader.shard.world_size)
    source, _ = datamodule.dataset.part("train")
    shape = (mine.stop - mine.start, *source.images.shape[1:])
    images = torch.zeros(shape, dtype=torch.uint8, device=datamodule.device)
    labels = torch.zeros(shape[:1], dtype=torch.int64, device=datamodule.device)
    return datamodule.ready(Batch(images, labels, first)).images


@contextmanager
def _left_as_it_was(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo what passes that warm up change: statistics, and the state of the GPU's generator."""
    statistics = [(buffer, buffer.clone()) for buffer in network.buffers()]
    generator = torch.cuda.get_rng_state(device)
    try:
        yield
    except BaseException:
        # A capture that breaks off leaves the generator as it is within one: its numbers would no
        # longer depend on its seed.
        fresh = torch.Generator(device).graphsafe_get_state()
        torch.cuda.default_generators[device.index or 0].graphsafe_set_state(fresh)
        raise
    finally:
        with torch.no_grad():
            for buffer, before in statistics:
                buffer.copy_(before)
        torch.cuda.set_rng_state(generator, device)
