"""torchvision's ResNet-18 for small images: its last layer, its stem, its starting weights."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.errors import UserError, first_line
from cifar_dist.storage import StorePath, at

if TYPE_CHECKING:
    from torch import Tensor
    from torchvision.models import ResNet

    from cifar_dist.config.train import TrainConfig

Shapes = dict[str, tuple[int, ...]]


def resnet18(num_classes: int, stem: str = "imagenet", weights: str = "none") -> ResNet:
    """A ResNet-18 with every layer trainable.

    Sources: He et al., "Deep residual learning for image recognition", 2016; torchvision. The
    ``cifar`` stem is the one of the paper's CIFAR networks: a 3x3 convolution, no max-pooling.

    Args:
        num_classes: outputs of the last layer.
        stem: ``imagenet`` (torchvision's own) or ``cifar``.
        weights: ``none`` (random, from torch's generator), ``imagenet`` (torchvision's,
            downloaded when missing), or a file. Where the weights' last layer is for another
            number of classes, it stays random.

    Returns:
        A module from ``[B, 3, H, W]`` float images to ``[B, num_classes]`` logits.

    Raises:
        UserError: the weights cannot be had or are another network's.
    """
    from torch import nn
    from torchvision.models import resnet18 as torchvision_resnet18

    network = torchvision_resnet18(weights=None)
    if stem == "cifar":
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        # Left out by being nothing, so that names of layers stay torchvision's.
        network.maxpool = nn.Identity()
    network.fc = nn.Linear(network.fc.in_features, num_classes)
    if weights != "none":
        values = imagenet_weights() if weights == "imagenet" else read_weights(weights)
        check_weights(weights, {name: tuple(v.shape) for name, v in values.items()}, stem)
        if len(values["fc.bias"]) != num_classes:
            values = {name: v for name, v in values.items() if not name.startswith("fc.")}
        network.load_state_dict({**network.state_dict(), **values})
    return network


def shapes(stem: str = "imagenet") -> Shapes:
    """Names and shapes of a ResNet-18's weights but its last layer's, without torch.

    The driver, which does without torch, refuses other networks' weights by them.
    """
    found: Shapes = {"conv1.weight": (64, 3, 3, 3) if stem == "cifar" else (64, 3, 7, 7)}

    def batch_norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.{part}"] = (channels,)
        found[f"{name}.num_batches_tracked"] = ()

    batch_norm("bn1", 64)
    inputs = 64
    for layer, outputs in enumerate((64, 128, 256, 512), start=1):
        for block in (0, 1):
            name = f"layer{layer}.{block}"
            found[f"{name}.conv1.weight"] = (outputs, inputs, 3, 3)
            batch_norm(f"{name}.bn1", outputs)
            found[f"{name}.conv2.weight"] = (outputs, outputs, 3, 3)
            batch_norm(f"{name}.bn2", outputs)
            if inputs != outputs:
                found[f"{name}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                batch_norm(f"{name}.downsample.1", outputs)
            inputs = outputs
    return found


def check_weights(where: str, found: Mapping[str, tuple[int, ...]], stem: str) -> None:
    """See that weights are a ResNet-18's with this stem; the last layer may have any width.

    Raises:
        UserError: a layer is missing, strange or of another shape; the message names the first.
    """
    expected = shapes(stem)
    classes = found["fc.bias"][0] if len(found.get("fc.bias", ())) == 1 else 10
    expected |= {"fc.weight": (classes, 512), "fc.bias": (classes,)}
    for name, shape in expected.items():
        if name not in found and not name.endswith("num_batches_tracked"):
            raise _other_network(where, f"it has no {name}")
        if name in found and tuple(found[name]) != shape:
            hint = f" (--stem {stem})" if name == "conv1.weight" else ""
            raise _other_network(
                where, f"its {name} is {list(found[name])}, not {list(shape)}{hint}"
            )
    for name in found:
        if name not in expected:
            raise _other_network(where, f"it has {name}")


def _other_network(where: str, difference: str) -> UserError:
    return UserError(
        f"--weights {where}: is not for this ResNet-18: {difference}; use another file"
    )


def check_weights_file(file: str | Path, stem: str) -> None:
    """See that a file holds a ResNet-18's weights, without torch where it is a disk's safetensors.

    Raises:
        UserError: it cannot be read, or is another network's.
    """
    if isinstance(at(file), StorePath) or Path(file).suffix != ".safetensors":
        check_weights(
            str(file), {name: tuple(v.shape) for name, v in read_weights(file).items()}, stem
        )
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            # A slice knows its shape; its values, which may be bfloat16, are not read.
            names: list[str] = list(opened.keys())
            found = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from None
    check_weights(str(file), found, stem)


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """Weights by name, from safetensors or from a torch file that holds nothing but tensors.

    Raises:
        UserError: the file is missing, damaged, or would run code when loaded.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = at(file).read_bytes()
        if at(file).name.endswith(".safetensors"):
            return load(content)
        values: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise _unreadable(file, error) from None
    except pickle.UnpicklingError:
        raise UserError(
            f"--weights {file}: is no torch file, or holds more than tensors, which could run "
            "code; save a state_dict() or safetensors"
        ) from None
    if not isinstance(values, dict) or not all(torch.is_tensor(v) for v in values.values()):
        raise UserError(f"--weights {file}: holds no state_dict(); save one, or safetensors")
    return values


def _unreadable(file: str | Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return UserError(f"--weights {file}: cannot be read ({reason}); give a .pth or .safetensors")


def imagenet_file() -> Path:
    """Where torchvision keeps its ImageNet weights on this node, found without torch."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = Path(os.environ.get("TORCH_HOME") or Path(cache) / "torch").expanduser()
    return home / "hub" / "checkpoints" / "resnet18-f37072fd.pth"


def imagenet_weights() -> dict[str, Tensor]:
    """torchvision's ImageNet weights, downloaded once a node and verified by their hash.

    Raises:
        UserError: they are not there and cannot be downloaded.
    """
    from filelock import FileLock
    from torchvision.models import ResNet18_Weights

    file = imagenet_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Library code prints nothing; torch's tells where it downloads to.
        with FileLock(file.with_suffix(".lock")), redirect_stdout(io.StringIO()):
            weights = ResNet18_Weights.IMAGENET1K_V1
            return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--weights imagenet: cannot be downloaded ({first_line(error)}); "
            f"put them at {file} or give --weights a file"
        ) from None


def check_starting_weights(config: TrainConfig) -> None:
    """See that the starting weights can be had, before workers are asked for.

    Raises:
        UserError: they cannot.
    """
    if config.weights == "imagenet":
        if not imagenet_file().exists():
            imagenet_weights()
    elif config.weights != "none":
        check_weights_file(config.weights, config.stem)
