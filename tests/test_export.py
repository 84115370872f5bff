"""What `export` writes: the model's own logits, where neither Ray nor Lightning is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cifar_dist.config.model import ExportConfig
from cifar_dist.config.train import TrainConfig
from cifar_dist.data.cache import prepare
from cifar_dist.data.datasets import find_source
from cifar_dist.errors import RunFailed
from cifar_dist.export import export
from cifar_dist.inference.model import model_of
from cifar_dist.train import train
from tests.processes import PATIENCE_S

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "lightning", "torchmetrics", "cifar_dist"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import json
import numpy as np
file, images, out = sys.argv[1:]
images = np.load(images)
"""
LOADERS = {
    "torch": """
import torch
program = torch.export.load(file, extra_files=(extra := {"classes": ""}))
logits = program.module()(torch.from_numpy(images)).numpy()
classes = json.loads(extra["classes"])
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(file)
logits = session.run(["logits"], {"images": images})[0]
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
""",
    "safetensors": """
import torch, torchvision
from safetensors import safe_open
with safe_open(file, "pt") as opened:
    classes = json.loads(opened.metadata()["classes"])
    assert opened.metadata()["image_size"] == "32"
    tensors = {name: opened.get_tensor(name) for name in opened.keys()}
mean, std = tensors.pop("mean"), tensors.pop("std")
network = torchvision.models.resnet18(num_classes=len(classes)).eval()
network.load_state_dict({name.removeprefix("network."): t for name, t in tensors.items()})
logits = network((torch.from_numpy(images).float() - mean) / std).detach().numpy()
""",
}
SAVE = "np.savez(out, logits=logits, classes=np.array(classes))"


@pytest.fixture(scope="module")
def run(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("runs")
    config = TrainConfig(data_dir=str(few_digits), num_workers=0, batch_size=24, flip=0.0,
                         max_epochs=2, lr=3e-4, storage_path=str(storage), name="run")  # fmt: skip
    return Path(str(train(config).run.path))


@pytest.mark.parametrize("form", ["torch", "onnx", "safetensors"])
def test_a_file_gives_the_models_logits_without_ray_and_lightning(
    run: Path, few_digits: Path, tmp_path: Path, form: str
) -> None:
    config = ExportConfig(model=str(run), format=form)
    found = export(config)
    assert (found.images, found.same_class) == (40, 40)
    assert found.largest_difference < 1e-4
    dataset = prepare("cifar10", find_source("cifar10", str(few_digits)))
    images = np.array(dataset.part("test")[0].images[:7])  # not the number that was exported with
    np.save(tmp_path / "images.npy", images)
    out = tmp_path / "found.npz"
    subprocess.run(
        [sys.executable, "-c", BLOCKED + LOADERS[form] + SAVE, str(found.file),
         str(tmp_path / "images.npy"), str(out)],
        check=True, timeout=PATIENCE_S,
    )  # fmt: skip
    import torch

    loaded = np.load(out)
    ours = model_of(config)[0].logits(torch.from_numpy(images)).numpy()
    assert loaded["logits"] == pytest.approx(ours, abs=1e-4)
    assert tuple(loaded["classes"]) == dataset.classes


def test_a_file_with_other_logits_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cifar_dist.inference import exported

    right = exported._safetensors

    def wrong(module, about):
        content, logits_of = right(module, about)
        return content, lambda images: logits_of(images) + 0.01

    monkeypatch.setattr(exported, "_safetensors", wrong)
    config = ExportConfig(model=str(run), format="safetensors", output=str(tmp_path / "x"))
    with pytest.raises(RunFailed, match="was not written: its logits differ"):
        export(config)
    assert not (tmp_path / "x").exists()


def test_images_that_the_network_sees_larger_are_resized_inside(
    few_digits: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        data_dir=str(few_digits),
        num_workers=0,
        batch_size=72,
        flip=0.0,
        max_epochs=1,
        image_size=48,
        storage_path=str(tmp_path),
        name="large",
    )
    run = train(config).run
    for form in ("torch", "onnx"):
        found = export(ExportConfig(model=str(run.path), format=form))
        assert found.same_class == found.images == 40
        assert found.largest_difference < 1e-3


def test_extras_that_are_missing_are_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"--format onnx: .*pip install 'cifar-dist\[onnx\]'"):
        export(ExportConfig(model=str(run), format="onnx"))


def test_the_environment_file_says_what_the_data_set_was(run: Path) -> None:
    saved = json.loads((run / "environment.json").read_text())["dataset"]
    assert saved["name"] == "cifar10"
    assert len(saved["classes"]) == 10
    assert len(saved["mean"]) == len(saved["std"]) == 3
    assert saved["side"] == 32
