"""The network: layers, stems, starting weights and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18 as torchvision_resnet18
from torchvision.models import resnet50

from cifar_dist.errors import UserError
from cifar_dist.model.resnet import check_weights_file, imagenet_file, resnet18, shapes


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_shapes_without_torch_are_the_networks(stem: str) -> None:
    state = resnet18(10, stem).state_dict()
    actual = {name: tuple(v.shape) for name, v in state.items() if not name.startswith("fc.")}
    assert shapes(stem) == actual


def test_it_is_torchvisions_with_another_last_layer() -> None:
    torch.manual_seed(0)
    network = resnet18(10).eval()
    reference = torchvision_resnet18(num_classes=10).eval()
    reference.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(images), reference(images))
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_cifar_stem_keeps_the_images_size() -> None:
    network = resnet18(10, "cifar")
    features = network.maxpool(network.relu(network.bn1(network.conv1(torch.randn(2, 3, 32, 32)))))
    assert features.shape == (2, 64, 32, 32)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("classes", [10, 1000])
def test_weights_come_from_a_file(tmp_path: Path, suffix: str, classes: int) -> None:
    saved = torchvision_resnet18(num_classes=classes).state_dict()
    file = tmp_path / f"weights.{suffix}"
    torch.save(saved, file) if suffix == "pth" else save_file(saved, file)
    check_weights_file(file, "imagenet")
    loaded = resnet18(10, weights=str(file)).state_dict()
    for name, values in saved.items():
        if not name.startswith("fc."):
            assert torch.equal(loaded[name], values)
    # The last layer of other classes is replaced, and of the same classes kept.
    assert loaded["fc.weight"].shape == (10, 512)
    assert (classes == 10) == torch.equal(loaded["fc.weight"], saved["fc.weight"][:10])


def save_as(file: Path, values: dict[str, torch.Tensor]) -> None:
    if file.suffix == ".pth":
        torch.save(values, file)
    else:
        save_file(values, file)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: resnet50().state_dict(), "has no|not"),
        (lambda state: {k: v for k, v in state.items() if k != "layer3.0.conv2.weight"},
         r"it has no layer3.0.conv2.weight"),
        (lambda state: {**state, "head.weight": torch.zeros(1)}, "it has head.weight"),
        (lambda state: resnet18(10, "cifar").state_dict(),
         r"its conv1.weight is \[64, 3, 3, 3\], not \[64, 3, 7, 7\] \(--stem imagenet\)"),
    ],
)  # fmt: skip
def test_weights_of_another_network_are_refused(tmp_path, suffix, change, said) -> None:
    file = tmp_path / f"weights.{suffix}"
    save_as(file, change(resnet18(10).state_dict()))
    for use in (
        lambda: check_weights_file(file, "imagenet"),
        lambda: resnet18(10, weights=str(file)),
    ):
        with pytest.raises(
            UserError, match=rf"--weights .*: is not for this ResNet-18: .*({said})"
        ):
            use()


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
        check_weights_file(file, "imagenet")
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError):
        check_weights_file(file, "imagenet")
    assert not Bomb.gone_off


@pytest.mark.parametrize(
    "name", ["missing.pth", "missing.safetensors", "empty.pth", "junk.safetensors"]
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.pth").touch()
    (tmp_path / "junk.safetensors").write_bytes(b"junk, not a header and values")
    with pytest.raises(UserError, match=f"--weights .*{name}"):
        check_weights_file(tmp_path / name, "imagenet")


def test_imagenet_weights_are_kept_where_torchvision_keeps_them(monkeypatch) -> None:
    from torchvision.models import ResNet18_Weights

    for name, value in (("TORCH_HOME", "/a"), ("XDG_CACHE_HOME", "/b"), ("HOME", "/c")):
        for each in ("TORCH_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(each, raising=False)
        monkeypatch.setenv(name, value)
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        assert imagenet_file() == folder / ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]


def test_imagenet_weights_come_from_torchvision(tmp_path: Path, monkeypatch) -> None:
    from torchvision.models import ResNet18_Weights

    saved = torchvision_resnet18(num_classes=1000).state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        ResNet18_Weights, "get_state_dict", lambda self, *, progress, check_hash: saved
    )
    loaded = resnet18(10, weights="imagenet").state_dict()
    assert torch.equal(loaded["layer4.1.conv2.weight"], saved["layer4.1.conv2.weight"])


def test_imagenet_weights_that_cannot_be_downloaded_say_what_to_do(tmp_path, monkeypatch) -> None:
    from urllib.error import URLError

    from torchvision.models import ResNet18_Weights

    def refuse(self, **options):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", refuse)
    with pytest.raises(UserError, match=r"--weights imagenet: .*no network.*resnet18-f37072fd.pth"):
        resnet18(10, weights="imagenet")
