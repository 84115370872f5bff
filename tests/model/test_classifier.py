"""Loss and metrics."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.datamodule import PADDING, Batch
from cifar_dist.model.classifier import Classifier


def classifier(world_size: int = 1, **settings) -> Classifier:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    module = Classifier(network, TrainConfig(**settings), steps_per_epoch=7)
    module._trainer = SimpleNamespace(world_size=world_size)
    return module


def batch(count: int, global_size: int | None = None) -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(count, 3, 2, 2), torch.arange(count) % 10, global_size or count)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_uneven_parts_give_the_global_batchs_gradient(smoothing: float) -> None:
    # 10 images over 3 ranks: 3 + 3 + 4. DDP averages the ranks' gradients.
    whole = batch(10)
    alone = classifier(label_smoothing=smoothing)
    alone.training_step(whole, 0).backward()
    expected = alone.network[1].weight.grad

    gradients = []
    for start, stop in ((0, 3), (3, 6), (6, 10)):
        ranks = classifier(world_size=3, label_smoothing=smoothing)
        part = Batch(whole.images[start:stop], whole.labels[start:stop], global_size=10)
        ranks.training_step(part, 0).backward()
        gradients.append(ranks.network[1].weight.grad)
    torch.testing.assert_close(torch.stack(gradients).mean(0), expected)


def test_the_loss_is_cross_entropy() -> None:
    module, some = classifier(), batch(8)
    expected = F.cross_entropy(module.network(some.images), some.labels)
    torch.testing.assert_close(module.training_step(some, 0), expected)


def test_padding_counts_for_nothing() -> None:
    plain, padded = classifier(), classifier()
    some = batch(8)
    plain.validation_step(some, 0)
    filled = Batch(
        torch.cat([some.images, torch.full((3, 3, 2, 2), 1e6)]),
        torch.cat([some.labels, torch.full((3,), PADDING)]),
        8,
    )
    padded.validation_step(filled, 0)
    empty = Batch(some.images, torch.full((8,), PADDING), 8)
    padded.validation_step(empty, 1)
    expected = plain.totals_of("val").compute()
    assert padded.totals_of("val").compute() == expected
    assert expected["images"] == 8


def test_totals_are_means_over_images_not_over_batches() -> None:
    module = classifier()
    for count in (9, 2, 5):
        module.validation_step(batch(count), 0)
    images = torch.cat([batch(count).images for count in (9, 2, 5)])
    labels = torch.cat([batch(count).labels for count in (9, 2, 5)])
    logits = module.network(images)
    totals = module.totals_of("val").compute()
    assert totals["images"] == 16
    assert totals["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert totals["accuracy"] == (logits.argmax(1) == labels).sum().item() / 16
    module.validation_step(batch(4), 0)
    assert module.totals_of("val").compute()["images"] == 4  # compute() began anew


def test_every_layer_is_trained() -> None:
    module = classifier()
    optimizer = module.configure_optimizers()["optimizer"]
    assert set(optimizer.param_groups[0]["params"]) == set(module.network.parameters())
