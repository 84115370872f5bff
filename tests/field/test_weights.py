"""Weights as other programs save them: wrapped, prefixed, renamed, incomplete, or no numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from cifar_dist.config.model import EvaluateConfig, ExportConfig, PredictConfig
from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import UserError
from cifar_dist.evaluate import evaluate
from cifar_dist.events import Event, Warned
from cifar_dist.export import export
from cifar_dist.inference.lookup import weights_file
from cifar_dist.model.networks import (
    check_network,
    check_starting_weights,
    network_weights,
)
from cifar_dist.model.resnet import resnet18
from cifar_dist.predict import predict
from cifar_dist.registry import NETWORKS
from cifar_dist.train import Trained, train
from tests.conftest import run_command
from tests.registering import register
from tests.runs.test_older_versions import TinyNetwork


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    register(monkeypatch, NETWORKS, "resnet34", TinyNetwork)
    return "resnet34"


def saved() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return TinyNetwork(10).state_dict()


def prefixed(prefix: str, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in (state or saved()).items()}


def without(state: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.endswith(ending)}


def taken(content: Any, tmp_path: Path, name: str = "weights.pth") -> tuple[dict, str]:
    """The weights by the network's names, and what is said of them, in a line."""
    save_file(content, tmp_path / name) if name.endswith("safetensors") else torch.save(
        content, tmp_path / name
    )
    heard: list[Event] = []
    found = network_weights(str(tmp_path / name), "resnet34", "imagenet", heard.append)
    lines = [event.message for event in heard if isinstance(event, Warned)]
    assert len(lines) <= 1
    assert "\n" not in "".join(lines)
    return found, "".join(lines)


def assert_saved(found: dict[str, Tensor]) -> None:
    assert found.keys() == saved().keys()
    assert all(torch.equal(found[name], value) for name, value in saved().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 7},
        lambda state: {"model": state, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
        lambda state: {"net": state, "acc": 95.5, "epoch": 199},
        lambda state: {"model_state_dict": state, "loss": torch.tensor(0.1)},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"state_dict": state, "best": np.float64(0.9), "epoch": np.int64(3)},
    ],
)
def test_a_training_script_saved_more_than_the_weights(wrap: Callable, tmp_path: Path) -> None:
    found, said = taken(wrap(saved()), tmp_path)
    assert_saved(found)
    assert not said


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "net.", "network.", "backbone.", "_orig_mod.", "module._orig_mod.",
     "_orig_mod.module.", "model.net.module."],
)  # fmt: skip
def test_a_wrapper_changed_all_names(prefix: str, tmp_path: Path) -> None:
    found, said = taken({"state_dict": prefixed(prefix)}, tmp_path)
    assert_saved(found)
    compiled = "omitted _orig_mod. from names" if "_orig_mod." in prefix else ""
    wrapper = prefix.replace("_orig_mod.", "")
    omitted = [compiled, f"omitted {wrapper} from names" if wrapper else ""]
    assert said.endswith(f"weights.pth: {', '.join(filter(None, omitted))}")


def test_a_part_of_the_network_was_compiled(tmp_path: Path) -> None:
    state = {name.replace("bn1.", "bn1._orig_mod."): value for name, value in saved().items()}
    found, said = taken(prefixed("module.", state), tmp_path)
    assert_saved(found)
    assert "omitted _orig_mod. from names, omitted module. from names" in said


def test_a_lightning_module_has_weights_of_its_own(tmp_path: Path) -> None:
    state = prefixed("model.") | {"criterion.weight": torch.ones(10)}
    found, said = taken({"state_dict": state, "epoch": 3}, tmp_path, "last.ckpt")
    assert_saved(found)
    assert said.endswith("omitted model. from names, ignored criterion.weight")


def test_the_last_layer_is_outside_of_the_backbone(tmp_path: Path) -> None:
    last = {name: value for name, value in saved().items() if name.startswith("fc.")}
    rest = {name: value for name, value in saved().items() if not name.startswith("fc.")}
    found, said = taken(prefixed("backbone.", rest) | last, tmp_path)
    assert_saved(found)
    assert "ignored" not in said


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.pth.tar", "a.bin", "a.ckpt", "a.safetensors"])
def test_weights_of_an_old_torch_have_no_counters(name: str, tmp_path: Path) -> None:
    found, _ = taken(without(saved(), "num_batches_tracked"), tmp_path, name)
    assert found.keys() == saved().keys()
    TinyNetwork(10).load_state_dict(found)


def test_safetensors_have_the_name_of_a_torch_file(tmp_path: Path) -> None:
    save_file(saved(), tmp_path / "weights.pth")
    assert_saved(network_weights(str(tmp_path / "weights.pth"), "resnet34", "imagenet"))


def test_weights_were_averaged_by_torch(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(TinyNetwork(10))
    averaged.module.load_state_dict(saved())
    found, said = taken(averaged.state_dict(), tmp_path)
    assert_saved(found)
    assert said.endswith("omitted module. from names, ignored n_averaged")


def test_weights_are_a_folder_of_the_hub(tmp_path: Path) -> None:
    torch.save(saved(), tmp_path / "pytorch_model.bin")
    assert_saved(network_weights(str(tmp_path), "resnet34", "imagenet"))
    assert weights_file(EvaluateConfig(model=str(tmp_path))) == tmp_path / "pytorch_model.bin"
    check_network(TrainConfig(network="resnet34", weights=str(tmp_path)))
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "other.bin")
    with pytest.raises(UserError, match="the folder holds neither model"):
        check_network(TrainConfig(network="resnet34", weights=str(tmp_path)))


# --- kuangliu's ResNet --------------------------------------------------------------------------


class Block(nn.Module):
    """BasicBlock of github.com/kuangliu/pytorch-cifar, by its names."""

    def __init__(self, before: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class Kuangliu(nn.Module):
    """ResNet18 of github.com/kuangliu/pytorch-cifar, by its names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        widths = [64, 64, 128, 256, 512]
        for n in (1, 2, 3, 4):
            first = Block(widths[n - 1], widths[n], 1 if n == 1 else 2)
            setattr(self, f"layer{n}", nn.Sequential(first, Block(widths[n], widths[n], 1)))
        self.linear = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for n in (1, 2, 3, 4):
            out = getattr(self, f"layer{n}")(out)
        return self.linear(F.avg_pool2d(out, 4).flatten(1))


def test_weights_are_of_kuangliu(tmp_path: Path) -> None:
    torch.manual_seed(2)
    theirs = Kuangliu().eval()
    file = tmp_path / "ckpt.pth"
    torch.save({"net": prefixed("module.", theirs.state_dict()), "acc": 95.0, "epoch": 1}, file)
    heard: list[Event] = []
    weights = network_weights(str(file), "resnet18", "cifar", heard.append)
    ours = resnet18(10, "cifar").eval()
    ours.load_state_dict(weights)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images))
    (warned,) = heard
    assert isinstance(warned, Warned)
    assert warned.message == (
        f"--weights {file}: omitted module. from names, took linear for fc, "
        "took shortcut for downsample"
    )
    with pytest.raises(UserError, match=r"not \[64, 3, 7, 7\]; it is for --stem cifar$"):
        network_weights(str(file), "resnet18", "imagenet")


# --- what cannot be taken -----------------------------------------------------------------------


def test_weights_hold_nan(tmp_path: Path) -> None:
    state = saved()
    state["fc.weight"][3, :2] = torch.nan
    for name in ("a.pth", "a.safetensors"):
        with pytest.raises(
            UserError, match=r"fc\.weight holds NaN, 2 of 40 values; use weights fro"
        ):
            taken(state, tmp_path, name)


def test_a_layer_has_another_name(tmp_path: Path) -> None:
    state = {name.replace("conv1", "conv_1").replace("fc", "classifier"): value
             for name, value in saved().items()}  # fmt: skip
    with pytest.raises(UserError) as raised:
        taken(prefixed("module.", state), tmp_path)
    assert str(raised.value).endswith(
        "weights.pth: is not for --network resnet34: it has no conv1.weight (expected "
        "conv1.weight, fc.weight, fc.bias; found instead, the nearest first, conv_1.weight, "
        "classifier.weight, classifier.bias); use another file"
    )


def test_weights_are_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        taken({f"block.{n}.weight": torch.ones(2) for n in range(9)}, tmp_path)
    said = str(raised.value)
    assert "expected conv1.weight, bn1.weight, bn1.bias and 4 more; found instead" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"epoch": 3, "optimizer": {"lr": 0.1}}, r"holds no state_dict\(\).*it holds epoch, optim"),
        ([1, 2], r"holds no state_dict\(\); save one, or safetensors$"),
        ({}, r"holds no state_dict\(\)"),
    ],
)
def test_a_file_holds_no_weights(content: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        taken(content, tmp_path)


# --- the project's own files, by every command --------------------------------------------------


@pytest.fixture
def run(few_digits: Path, tmp_path: Path) -> Trained:
    return train(run_config(few_digits, tmp_path, name="first", ema=0.5))


def run_config(data: Path, tmp_path: Path, **changes) -> TrainConfig:
    return TrainConfig(
        data_dir=str(data), network="resnet34", num_workers=0, batch_size=24, flip=0.0,
        max_epochs=1, report=False, storage_path=str(tmp_path / "runs"), **changes,
    )  # fmt: skip


def test_the_projects_own_files_are_taken_by_every_command(
    run: Trained, few_digits: Path, tmp_path: Path
) -> None:
    folder = run.run.path
    exported = export(ExportConfig(model=str(folder), format="safetensors"))
    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    accuracy = run.summary["test_accuracy"]
    image = str(
        sorted((evaluate(EvaluateConfig(model=str(folder))).folder / "hardest-test").glob("*"))[0]
    )
    before = (folder / "evaluation-test.json").read_text()
    own = network_weights(str(run.run.model_file), "resnet34", "imagenet")
    first = next(iter(predict(PredictConfig(model=str(folder), images=(image,)))))
    for file in (folder, run.run.model_file, checkpoint, exported.file):
        found = network_weights(str(file), "resnet34", "imagenet")
        assert all(torch.equal(found[name], value) for name, value in own.items())
        check_starting_weights(run_config(few_digits, tmp_path, weights=str(file)))
        assert evaluate(EvaluateConfig(model=str(file))).scores.accuracy == accuracy
        assert next(iter(predict(PredictConfig(model=str(file), images=(image,))))) == first
        out = str(tmp_path / "out.pt2")
        assert export(ExportConfig(model=str(file), output=out)).same_class == 40
    # The run's own evaluation is that of its result.
    assert (folder / "evaluation-test.json").read_text() == before
    tuned = train(run_config(few_digits, tmp_path, name="tuned", weights=str(checkpoint), lr=1e-5))
    assert np.isfinite(tuned.summary["test_loss"])


def test_weights_of_a_script_are_taken_by_every_command(
    run: Trained, few_digits: Path, tmp_path: Path
) -> None:
    own = network_weights(str(run.run.model_file), "resnet34", "imagenet")
    state = prefixed("module.", without(own, "num_batches_tracked"))
    file = tmp_path / "best.pth.tar"
    torch.save({"state_dict": state, "epoch": 90}, file)
    given = {"model": str(file), "network": "resnet34", "data_dir": str(few_digits)}
    heard: list[Event] = []
    measured = evaluate(EvaluateConfig(**given), heard.append)
    assert measured.scores.accuracy == run.summary["test_accuracy"]
    out = str(tmp_path / "out.pt2")
    export(ExportConfig(**given, output=out), heard.append)
    picture = tmp_path / "a.png"
    from PIL import Image

    Image.new("RGB", (32, 32)).save(picture)
    assert next(predict(PredictConfig(**given, images=(str(picture),)), heard.append)).classes
    train(run_config(few_digits, tmp_path, name="tuned", weights=str(file)), heard.append)
    said = [event.message for event in heard if isinstance(event, Warned)]
    assert said == [f"--weights {file}: omitted module. from names"] * 4


def test_a_checkpoint_was_damaged(run: Trained) -> None:
    (checkpoint,) = (run.run.path / "checkpoints").glob("*.ckpt")
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read \(its bytes do not give the che"):
        network_weights(str(checkpoint), "resnet34", "imagenet")


def test_a_file_of_no_weights_is_refused_in_one_line(few_digits: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {"a.weight": torch.ones(3)}}, tmp_path / "other.pth.tar")
    words = ["other.pth.tar", "--data-dir", str(few_digits)]
    done = run_command(tmp_path, *words, module="cifar_dist.evaluate")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "found instead, the nearest first, a.weight" in done.err
    assert json.dumps(done.out) == '""'


def test_a_file_has_a_layer_under_both_names(tmp_path: Path) -> None:
    state = saved() | {"linear.weight": torch.zeros(10, 4)}
    with pytest.raises(UserError, match=r"it has linear\.weight; use another file"):
        taken(state, tmp_path)
