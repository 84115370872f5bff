"""Averaged weights: their arithmetic, what is made of them, and that they resume to the bit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cifar_dist.config.train import TrainConfig
from cifar_dist.data.cache import prepare
from cifar_dist.data.datamodule import PADDING, ImageDataModule
from cifar_dist.data.datasets import find_source
from cifar_dist.errors import Interrupted
from cifar_dist.model.classifier import Classifier
from cifar_dist.train import Trained
from cifar_dist.training.averaging import AverageWeights
from cifar_dist.training.checkpoints import read_checkpoint
from tests.training.small import STEPS, Breaking, SignalAt, Small, TrainFew, same, small_network

RECIPE: dict[str, Any] = {
    "optimizer": "sgd", "schedule": "onecycle", "lr": 0.05, "warmup_epochs": 0.5,
    "anneal": "linear", "final_lr_factor": 0.0, "decay_norm_bias": False, "ema": 0.5,
    "crop_padding_mode": "reflect", "cutout": 4, "label_smoothing": 0.1,
}  # fmt: skip
"""The settings of the preset cifar; the decay is one that so short a run reaches."""


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Breaking, "seen", [])
    with small_network(Breaking):
        yield


@pytest.fixture(scope="module")
def undisturbed(train_few: TrainFew, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    with small_network(Breaking):
        return train_few(tmp_path_factory.mktemp("runs"), "undisturbed", **RECIPE)


def states(file) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The trained and the averaged network's state in a checkpoint."""
    state = read_checkpoint(file)["state_dict"]
    trained, average = (
        {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        for prefix in ("network.", "average.")
    )
    return trained, average


def averaged_by_hand(
    states: list[dict[str, torch.Tensor]], decay: float
) -> dict[str, torch.Tensor]:
    """The average after the steps that led from each state to the next."""
    average = {name: value.double() for name, value in states[0].items()}
    for updates, state in enumerate(states[1:]):
        now = min(decay, (1 + updates) / (10 + updates))
        for name, value in state.items():
            average[name] = now * average[name] + (1 - now) * value.double()
    return average


@pytest.mark.parametrize("skipped", [(), (0, 3, STEPS + 1)])
def test_each_step_moves_the_average_and_one_that_is_skipped_spoils_nothing(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skipped: tuple[int, ...]
) -> None:
    monkeypatch.setattr(Breaking, "breaks", skipped)
    done = train_few(tmp_path, "run", **RECIPE, on_nonfinite="skip")
    assert done.summary["skipped_updates"] == len(skipped)
    last, average = states(done.run.checkpoint(3))
    expected = averaged_by_hand([*Breaking.seen, last], decay=RECIPE["ema"])
    for name, value in average.items():
        if name.endswith("num_batches_tracked"):
            assert int(value) == 3 * STEPS - len(skipped)
        else:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(average["conv1.weight"], last["conv1.weight"], rtol=1e-3)


def test_after_its_beginning_the_average_is_torchs_to_the_bit() -> None:
    module = Classifier(nn.Linear(12, 10), TrainConfig(ema=0.9), 7)
    moves = AverageWeights(0.9)
    moves.updates = 80  # (1 + 80) / (10 + 80) = 0.9
    reference = AveragedModel(module.network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    reference.n_averaged += 1  # it would copy the first weights that it sees
    torch.manual_seed(1)
    moves.on_train_start(None, module)
    for _ in range(20):
        with torch.no_grad():
            for weight in module.network.parameters():
                weight += torch.randn_like(weight)
        moves.on_train_batch_end(None, module, None, None, 0)
        reference.update_parameters(module.network)
    assert moves.updates == 100
    for mine, its in zip(module.average.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_waits_for_no_average_and_gives_the_same() -> None:
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        module = Classifier(Small(), TrainConfig(ema=0.9), 7)
        moves = AverageWeights(0.9)
        start = {name: value.clone() for name, value in module.average.state_dict().items()}
        with torch.no_grad():
            for weight in module.network.parameters():
                weight += 1.0
        module.to(device)
        moves.on_train_start(None, module)
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            for _ in range(20):
                moves.on_train_batch_end(None, module, None, None, 0)
            moves.on_validation_start(None, module)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not torch.equal(module.average.conv1.weight.cpu(), start["conv1.weight"])
        found.append({n: v.cpu() for n, v in module.average.state_dict().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def test_the_average_is_no_part_of_what_is_optimized() -> None:
    module = Classifier(nn.Linear(12, 10), TrainConfig(ema=0.9), 7)
    optimizer = module.configure_optimizers()["optimizer"]
    in_groups = {each for group in optimizer.param_groups for each in group["params"]}
    assert in_groups == set(module.network.parameters())
    assert not any(each.requires_grad for each in module.average.parameters())


def test_the_average_is_what_is_kept_and_hashed(undisturbed: Trained) -> None:
    trained, average = states(undisturbed.run.checkpoint(3))
    assert hashlib.sha256(save(average)).hexdigest() == undisturbed.summary["weights_sha256"]
    assert not torch.equal(trained["fc.weight"], average["fc.weight"])
    _, best = states(undisturbed.run.checkpoint(undisturbed.outcome.best_epoch))
    kept = load_file(undisturbed.run.model_file)
    assert kept.keys() == best.keys()
    assert all(torch.equal(kept[name], value) for name, value in best.items())


def test_the_average_is_what_is_validated_and_tested(
    train_few: TrainFew, tmp_path: Path, few_digits: Path
) -> None:
    # Were the last epoch the best, the network that was trained last would pass for the one that
    # was loaded to be tested.
    settings = {**RECIPE, "lr": 2.0}
    runs = (train_few(tmp_path, f"run-{seed}", seed=seed, **settings) for seed in range(20))
    done = next(run for run in runs if run.outcome.best_epoch < 3)
    network = Small()
    network.load_state_dict(load_file(done.run.model_file))
    dataset = prepare("cifar10", find_source("cifar10", str(few_digits)))
    images = ImageDataModule(TrainConfig(batch_size=24, data_dir=str(few_digits)), dataset)
    losses = {}
    for split, batches in (("val", images.val_dataloader()), ("test", images.test_dataloader())):
        total = count = 0.0
        for batch in map(images.ready, batches):
            with torch.no_grad():
                logits = network.eval()(batch.images)
            total += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
            count += int((batch.labels != PADDING).sum())
        losses[split] = total / count
    best = done.outcome.history[done.outcome.best_epoch - 1]
    assert best["val_loss"] == pytest.approx(losses["val"], rel=1e-5)
    assert done.summary["test_loss"] == pytest.approx(losses["test"], rel=1e-5)


@pytest.mark.parametrize(("epoch", "step"), [(1, 1), (2, 4), (2, STEPS), (3, 5)])
def test_an_interrupted_average_resumes_to_the_bit(
    train_few: TrainFew, undisturbed: Trained, tmp_path: Path, epoch: int, step: int
) -> None:
    with pytest.raises(Interrupted, match="to resume: "):
        train_few(tmp_path, "cut", SignalAt(epoch, step), **RECIPE)
    resumed = train_few(tmp_path, "cut", resume=True, **RECIPE)
    same(resumed, undisturbed)
    assert resumed.run.model_file.read_bytes() == undisturbed.run.model_file.read_bytes()
    after, expected = (states(each.run.checkpoint(3)) for each in (resumed, undisturbed))
    for mine, its in zip(after, expected, strict=True):
        assert all(torch.equal(mine[name], value) for name, value in its.items())


def test_the_best_average_is_mended_after_a_kill_between_the_files(
    train_few: TrainFew, undisturbed: Trained, tmp_path: Path
) -> None:
    done = train_few(tmp_path, "done", **RECIPE)
    done.run.model_file.write_bytes(b"that of another epoch")
    train_few(tmp_path, "done", resume=True, **RECIPE)
    assert done.run.model_file.read_bytes() == undisturbed.run.model_file.read_bytes()


def test_what_is_trained_does_not_depend_on_the_average(
    train_few: TrainFew, undisturbed: Trained, tmp_path: Path
) -> None:
    plain = train_few(tmp_path, "plain", **{**RECIPE, "ema": 0.0})
    trained, _ = states(undisturbed.run.checkpoint(3))
    without, none = states(plain.run.checkpoint(3))
    assert none == {}
    assert all(torch.equal(trained[name], value) for name, value in without.items())
