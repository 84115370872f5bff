"""Weights in files, and torchvision's ImageNet weights: read, or refused with what to do.

At import this loads no torch: the driver checks that files can be read before it loads any.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.errors import UserError, first_line
from cifar_dist.storage import StorePath, at, on_disk, user_cache

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
"""Shapes of weights and statistics by name."""


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """Read weights by name, from safetensors or a torch file that holds nothing but tensors.

    Raises:
        UserError: the file is missing, damaged, or would run code when loaded.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # As bytes, since the file may be in an object store, which torch cannot open.
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


def shapes_of(weights: Mapping[str, Tensor]) -> Shapes:
    """Return the shapes of weights by name."""
    return {name: tuple(value.shape) for name, value in weights.items()}


def shapes_in(file: str | Path) -> Shapes:
    """Read the shapes of the weights in a file; raises as `read_weights`."""
    return _shapes_in_header(file) if _has_header(file) else shapes_of(read_weights(file))


def check_readable(file: str | Path) -> None:
    """Check, without torch, as much of a file of weights as that allows.

    A safetensors file on a disk is checked for a valid header; any other for being there and not
    empty, since what is in it takes torch.

    Raises:
        UserError: it cannot be read.
    """
    if _has_header(file):
        _shapes_in_header(file)
        return
    path = at(file)
    try:
        if isinstance(path, StorePath):
            found = path.is_file()
        else:
            with path.open("rb") as opened:
                found = bool(opened.read(1))
    except OSError as error:
        raise _unreadable(file, error) from None
    if not found:
        raise _unreadable(file, EOFError("it is empty, or not there"))


def _has_header(file: str | Path) -> bool:
    """Return whether the file is safetensors on a disk, whose shapes are known without torch."""
    return not isinstance(at(file), StorePath) and Path(file).suffix == ".safetensors"


def _shapes_in_header(file: str | Path) -> Shapes:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            # A slice knows its shape; its values, which may be bfloat16, are not read.
            names: list[str] = list(opened.keys())
            return {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: str | Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return UserError(f"--weights {file}: cannot be read ({reason}); give a .pth or .safetensors")


def imagenet_folder() -> Path:
    """Return where torchvision keeps downloaded weights on this node, without loading torch.

    Raises:
        UserError: there is no home directory.
    """
    given = os.environ.get("TORCH_HOME")
    home = on_disk(given) if given else user_cache("TORCH_HOME") / "torch"
    return home / "hub" / "checkpoints"


def is_downloaded(torchvision_name: str) -> bool:
    """Return whether a network's ImageNet weights are on this node, without loading torch.

    torchvision's file names begin with the network's, e.g. ``resnet18-f37072fd.pth``.
    """
    return any(imagenet_folder().glob(f"{torchvision_name}-*.pth"))


def imagenet_weights(torchvision_name: str) -> dict[str, Tensor]:
    """Read torchvision's ImageNet weights, downloaded once a node and verified by their hash.

    They are those called ``IMAGENET1K_V1``: which ones are the default depends on torchvision's
    version, and the same settings would then start from others.

    Raises:
        UserError: they are not there and cannot be downloaded.
    """
    from filelock import FileLock
    from torchvision.models import get_model_weights

    weights = get_model_weights(torchvision_name).IMAGENET1K_V1
    file = imagenet_folder() / weights.url.rpartition("/")[2]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Library code prints nothing; torch prints where it downloads to.
        with FileLock(file.with_suffix(".lock")), redirect_stdout(io.StringIO()):
            return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--weights imagenet: cannot be downloaded ({first_line(error)}); "
            f"put them at {file} or give --weights a file"
        ) from None
