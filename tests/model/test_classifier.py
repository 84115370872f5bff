"""Loss, metrics, optimizer, schedule."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.datamodule import PADDING, Batch
from cifar_dist.model.classifier import Classifier
from cifar_dist.model.resnet import resnet18


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


def test_adamw_and_steplr_are_as_set() -> None:
    made = classifier(lr=0.01, weight_decay=0.3, step_size=2, gamma=0.1).configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    assert schedule["interval"] == "epoch"
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule["scheduler"].step()
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001])


def test_sgd_and_onecycle_are_as_set() -> None:
    module = classifier(optimizer="sgd", schedule="onecycle", lr=0.4, max_epochs=3)
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["nesterov"]
    assert schedule["interval"] == "step"
    rates = []
    for _ in range(3 * 7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule["scheduler"].step()
    assert max(rates) == pytest.approx(0.4, rel=0.02)
    assert rates[-1] < rates[0] < max(rates)


def rates_of(steps_per_epoch: int = 7, **settings) -> list[list[float]]:
    """The learning rates of every step of a run, by parameter group."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10))
    config = TrainConfig(**{"optimizer": "sgd", "schedule": "onecycle", **settings})
    made = Classifier(network, config, steps_per_epoch).configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(config.max_epochs * steps_per_epoch):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()  # behind the last step too, as Lightning does
    return [list(each) for each in zip(*rates, strict=True)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_cycle_is_torchs_own_by_default(optimizer: str) -> None:
    (rates,) = rates_of(lr=0.3, max_epochs=10, optimizer=optimizer)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.3)
    torchs = torch.optim.lr_scheduler.OneCycleLR(plain, 0.3, 70, cycle_momentum=False)
    for rate in rates:
        assert rate == plain.param_groups[0]["lr"]  # to the last bit: golden runs rest on it
        plain.step()
        torchs.step()


def test_a_cycle_rises_over_the_warm_up_and_falls_straight_to_zero() -> None:
    rates, again = rates_of(
        lr=0.4, max_epochs=15, warmup_epochs=3, anneal="linear", final_lr_factor=0.0,
        decay_norm_bias=False,
    )  # fmt: skip
    assert again == rates
    # A fifth of the run is what a linear cycle rises over by itself.
    assert rates_of(lr=0.4, max_epochs=15, anneal="linear", final_lr_factor=0.0) == [rates]
    top = 3 * 7 - 1
    assert max(rates) == rates[top] == pytest.approx(0.4)
    assert rates[0] == pytest.approx(0.4 / 25)
    assert rates[-1] == 0
    rising, falling = rates[: top + 1], rates[top:]
    for part in (rising, falling):
        steps = [after - before for before, after in pairwise(part)]
        assert steps == pytest.approx([steps[0]] * len(steps))


def test_a_cosine_ends_at_zero_too() -> None:
    (rates,) = rates_of(lr=0.4, max_epochs=5, warmup_epochs=1.5, final_lr_factor=0.0)
    assert rates[-1] == pytest.approx(0, abs=1e-15)
    assert max(rates) == pytest.approx(0.4, rel=0.01)


@pytest.mark.parametrize("warmup_epochs", [0, 0.1, 1, 1.5, 2, 3.9, None])
@pytest.mark.parametrize("steps_per_epoch", [1, 2, 5, 7])
@pytest.mark.parametrize("max_epochs", [1, 4])
def test_any_warm_up_can_be_run(
    warmup_epochs: float | None, steps_per_epoch: int, max_epochs: int
) -> None:
    if warmup_epochs is not None and warmup_epochs >= max_epochs:
        return  # refused
    # torch's cycle divides by zero where the rate rises over exactly one step.
    (rates,) = rates_of(
        steps_per_epoch, lr=0.4, max_epochs=max_epochs, warmup_epochs=warmup_epochs, anneal="linear"
    )
    assert all(0 < rate <= 0.4 + 1e-12 for rate in rates)
    share = 0.2 * max_epochs if warmup_epochs is None else warmup_epochs
    if share * steps_per_epoch < 2:
        assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_spares_biases_and_normalisation_only(optimizer: str) -> None:
    network = resnet18(10, "cifar")
    settings = {"optimizer": optimizer, "lr": 0.5, "weight_decay": 0.25, "decay_norm_bias": False}
    module = Classifier(network, TrainConfig(**settings), 7)
    made = module.configure_optimizers()["optimizer"]
    in_groups = [each for group in made.param_groups for each in group["params"]]
    assert len(in_groups) == len(set(in_groups)) == len(list(network.parameters()))
    before = {name: each.detach().clone() for name, each in network.named_parameters()}
    for each in network.parameters():
        each.grad = torch.zeros_like(each)
    made.step()  # without gradients only decay moves anything
    norms = {name for name, each in network.named_modules() if isinstance(each, nn.BatchNorm2d)}
    for name, each in network.named_parameters():
        spared = name.endswith("bias") or name.rpartition(".")[0] in norms
        assert torch.equal(each, before[name]) == spared, name


def test_by_default_everything_decays() -> None:
    (group,) = (
        Classifier(resnet18(10), TrainConfig(weight_decay=0.25), 7)
        .configure_optimizers()["optimizer"]
        .param_groups
    )
    assert group["weight_decay"] == 0.25


def test_every_layer_is_trained() -> None:
    module = classifier()
    optimizer = module.configure_optimizers()["optimizer"]
    assert set(optimizer.param_groups[0]["params"]) == set(module.network.parameters())
