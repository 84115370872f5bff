"""Networks by name: made, started from weights, and refused weights of others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18 as torchvision_resnet18
from torchvision.models import resnet50

from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import UserError
from cifar_dist.model.networks import (
    check_network,
    check_starting_weights,
    check_weights,
    make_network,
    network_shapes,
)
from cifar_dist.model.resnet import resnet18
from cifar_dist.model.weights import shapes_of
from cifar_dist.registry import NETWORKS
from tests.conftest import ROOT
from tests.processes import PATIENCE_S


class Tiny(nn.Module):
    """Has neither a choice of stems nor known weights, and calls its last layer by another name."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images).mean((2, 3)))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a network that has been registered."""
    monkeypatch.setitem(NETWORKS._places, "tiny", "")
    monkeypatch.setitem(NETWORKS._loaded, "tiny", Tiny)
    return "tiny"


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_shapes_are_the_networks_and_no_generator_advances(stem: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    shapes = network_shapes("resnet18", 10, stem)
    assert torch.equal(torch.get_rng_state(), before)
    assert shapes == shapes_of(resnet18(10, stem).state_dict())


def test_it_is_made_with_its_options(tiny: str) -> None:
    assert make_network("resnet18", 7, "cifar")(torch.zeros(2, 3, 8, 8)).shape == (2, 7)
    assert make_network(tiny, 7)(torch.zeros(2, 3, 8, 8)).shape == (2, 7)


def save_as(file: Path, values: dict[str, torch.Tensor]) -> None:
    if file.suffix == ".pth":
        torch.save(values, file)
    else:
        save_file(values, file)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("classes", [10, 1000])
def test_weights_come_from_a_file(tmp_path: Path, suffix: str, classes: int) -> None:
    saved = torchvision_resnet18(num_classes=classes).state_dict()
    file = tmp_path / f"weights.{suffix}"
    save_as(file, saved)
    check_starting_weights(TrainConfig(weights=str(file)))
    loaded = make_network("resnet18", 10, weights=str(file)).state_dict()
    for name, values in saved.items():
        if not name.startswith("fc."):
            assert torch.equal(loaded[name], values)
    # The last layer of other classes is replaced, and of the same classes kept.
    assert loaded["fc.weight"].shape == (10, 512)
    assert (classes == 10) == torch.equal(loaded["fc.weight"], saved["fc.weight"][:10])


def test_any_networks_last_layer_is_found(tmp_path: Path, tiny: str) -> None:
    saved = Tiny(5).state_dict()
    save_file(saved, file := tmp_path / "tiny.safetensors")
    assert check_weights(str(file), shapes_of(saved), tiny, "imagenet") == 5
    loaded = make_network(tiny, 10, weights=str(file)).state_dict()
    assert torch.equal(loaded["features.weight"], saved["features.weight"])
    assert loaded["head.weight"].shape == (10, 4)


def test_weights_without_counts_of_batches_are_taken() -> None:
    shapes = network_shapes("resnet18", 10)
    old = {name: shape for name, shape in shapes.items() if "num_batches_tracked" not in name}
    assert check_weights("old.pth", old, "resnet18", "imagenet") == 10


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: resnet50().state_dict(), "has no|not"),
        (lambda state: {k: v for k, v in state.items() if k != "layer3.0.conv2.weight"},
         r"it has no layer3.0.conv2.weight"),
        (lambda state: {k: v for k, v in state.items() if not k.startswith("fc.")},
         r"it has no fc.weight"),
        (lambda state: {**state, "head.weight": torch.zeros(1)}, "it has head.weight"),
        (lambda state: resnet18(10, "cifar").state_dict(),
         r"its conv1.weight is \[64, 3, 3, 3\], not \[64, 3, 7, 7\]"),
    ],
)  # fmt: skip
def test_weights_of_another_network_are_refused(tmp_path, suffix, change, said) -> None:
    file = tmp_path / f"weights.{suffix}"
    save_as(file, change(resnet18(10).state_dict()))
    for use in (
        lambda: check_starting_weights(TrainConfig(weights=str(file))),
        lambda: make_network("resnet18", 10, weights=str(file)),
    ):
        with pytest.raises(
            UserError,
            match=rf"--weights .*: is not for --network resnet18 --stem imagenet: .*({said})",
        ):
            use()


def test_what_a_network_does_not_have_is_refused(tiny: str, monkeypatch) -> None:
    with pytest.raises(UserError, match="--stem cifar: --network tiny has one stem only"):
        check_network(TrainConfig(network=tiny, stem="cifar"))
    with pytest.raises(UserError, match="--weights imagenet: there are none for --network tiny"):
        check_network(TrainConfig(network=tiny, weights="imagenet"))
    check_network(TrainConfig(network=tiny))


ONE_LINE = """
import json
import sys
from cifar_dist.model.resnet import TorchvisionResNet
from cifar_dist.registry import NETWORKS

NETWORKS.register("resnet34-test", TorchvisionResNet("resnet34"))
from cifar_dist.config.model import EvaluateConfig, ExportConfig, PredictConfig
from cifar_dist.config.train import TrainConfig
from cifar_dist.evaluate import evaluate
from cifar_dist.export import export
from cifar_dist.predict import predict
from cifar_dist.train import train

data, storage = sys.argv[1:]
plans = []
trained = train(
    TrainConfig(data_dir=data, num_workers=0, batch_size=48, flip=0.0, max_epochs=1,
                network="resnet34-test", stem="cifar", image_size=8,
                storage_path=storage, name="run"),
    lambda event: plans.extend(getattr(event, "lines", [])),
)
model = str(trained.run.path)
hardest = f"{model}/hardest-test"
print(json.dumps({
    "plan": plans[0],
    "tested": trained.summary["test_accuracy"],
    "evaluated": evaluate(EvaluateConfig(model=model)).scores.accuracy,
    "predicted": len(list(predict(PredictConfig(model=model, images=(hardest,))))),
    "exported": export(ExportConfig(model=model, format="safetensors")).same_class,
}))
"""


def test_another_network_takes_one_line_in_the_registry(few_digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("tyro")  # of the commands
    # In a process of its own: the choices of --network are those of the registry at import.
    done = subprocess.run(
        [sys.executable, "-c", ONE_LINE, str(few_digits), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "resnet34-test on cifar10 (" in found["plan"]
    assert found["evaluated"] == found["tested"]
    assert (found["predicted"], found["exported"]) == (24, 40)
    report = (tmp_path / "run" / "report.html").read_text()
    assert "resnet34-test on cifar10" in report
