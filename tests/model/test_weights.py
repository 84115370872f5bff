"""Files of weights: what is read, what is refused, and ImageNet weights."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cifar_dist.errors import UserError
from cifar_dist.model.networks import make_network
from cifar_dist.model.weights import (
    check_readable,
    imagenet_folder,
    is_downloaded,
    read_weights,
    shapes_of,
)
from tests.conftest import ROOT


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_and_shapes_are_read_from_a_file(tmp_path: Path, suffix: str) -> None:
    saved = {"weight": torch.arange(6).view(2, 3).bfloat16(), "count": torch.tensor(7)}
    file = tmp_path / f"weights.{suffix}"
    torch.save(saved, file) if suffix == "pth" else save_file(saved, file)
    check_readable(file)
    found = read_weights(file)
    assert all(torch.equal(found[name], value) for name, value in saved.items())
    assert shapes_of(found) == shapes_of(saved) == {"weight": (2, 3), "count": ()}


class Bomb:
    gone_off = False

    def __reduce__(self):
        return (explode, ())


def explode() -> None:
    Bomb.gone_off = True


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"conv1.weight": Bomb()}, file)
    with pytest.raises(UserError, match="could run code"):
        read_weights(file)
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError):
        read_weights(file)
    assert not Bomb.gone_off


@pytest.mark.parametrize(
    "name", ["missing.pth", "missing.safetensors", "empty.pth", "junk.safetensors"]
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.pth").touch()
    (tmp_path / "junk.safetensors").write_bytes(b"junk, not a header and values")
    for use in (check_readable, read_weights):
        with pytest.raises(UserError, match=f"--weights .*{name}: cannot be read"):
            use(tmp_path / name)


def test_what_is_obvious_is_refused_without_torch(tmp_path: Path) -> None:
    (tmp_path / "junk.safetensors").write_bytes(b"junk, not a header and values")
    code = """
import sys
from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import UserError
from cifar_dist.model.networks import check_network
for name in ("missing.pth", "junk.safetensors"):
    try:
        check_network(TrainConfig(weights=f"{sys.argv[1]}/{name}"))
    except UserError as error:
        print(error)
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    missing, junk = done.stdout.splitlines()
    assert "missing.pth: cannot be read (No such file" in missing
    assert "junk.safetensors: cannot be read (" in junk


def test_imagenet_weights_are_kept_where_torchvision_keeps_them(tmp_path, monkeypatch) -> None:
    for name, value in (("TORCH_HOME", "/a"), ("XDG_CACHE_HOME", "/b"), ("HOME", "/c")):
        for each in ("TORCH_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(each, raising=False)
        monkeypatch.setenv(name, value)
        assert imagenet_folder() == Path(torch.hub.get_dir()) / "checkpoints"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert not is_downloaded("resnet18")
    imagenet_folder().mkdir(parents=True)
    (imagenet_folder() / "resnet18-f37072fd.pth").touch()
    assert is_downloaded("resnet18")
    assert not is_downloaded("resnet1")


def test_imagenet_weights_come_from_torchvision(tmp_path: Path, monkeypatch) -> None:
    from torchvision.models import ResNet18_Weights, resnet18

    saved = resnet18(num_classes=1000).state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        ResNet18_Weights, "get_state_dict", lambda self, *, progress, check_hash: saved
    )
    loaded = make_network("resnet18", 10, weights="imagenet").state_dict()
    assert torch.equal(loaded["layer4.1.conv2.weight"], saved["layer4.1.conv2.weight"])
    assert loaded["fc.weight"].shape == (10, 512)


def test_imagenet_weights_that_cannot_be_downloaded_say_what_to_do(tmp_path, monkeypatch) -> None:
    from urllib.error import URLError

    from torchvision.models import ResNet18_Weights

    def refuse(self, **options):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", refuse)
    with pytest.raises(UserError, match=r"--weights imagenet: .*no network.*resnet18-f37072fd.pth"):
        make_network("resnet18", 10, weights="imagenet")
