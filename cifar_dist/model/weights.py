"""Weights in files, and torchvision's ImageNet weights: read, or refused with what to do.

At import this loads no torch: the driver checks that files can be read before it loads any.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.errors import UserError, first_line
from cifar_dist.model.weight_names import listed
from cifar_dist.storage import AnyPath, StorePath, at, on_disk, user_cache

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM_MARK = b"cifar_dist sha256 "
CHECKSUM_BYTES = len(CHECKSUM_MARK) + 64
"""Length of the comment that ends a checkpoint: this mark and the SHA-256 of all before it."""
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
"""Where training scripts put a network's weights in what they save; the first is taken."""
_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")
"""Files of weights in the folders of runs, and in the Hub's."""

Shapes = dict[str, tuple[int, ...]]
"""Shapes of weights and statistics by name."""


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """Read weights by the file's names, from safetensors or a torch file of nothing but tensors.

    A torch file may hold more beside them, e.g. an epoch or an optimizer's state. A folder stands
    for the weights in it, e.g. a run's.

    Raises:
        UserError: the file is missing, damaged, holds NaN, or would run code when loaded.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = file_of(file)
    try:
        # As bytes, since the file may be in an object store, which torch cannot open.
        content = path.read_bytes()
        # By the file's beginning, too: a size, and JSON, as no torch file begins.
        if path.name.endswith(".safetensors") or content[8:9] == b"{":
            values: Any = load(content)
        elif is_damaged(content):
            raise EOFError("its bytes do not give the checksum that it was saved with")
        else:
            with torch.serialization.safe_globals(_numbers()):
                values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise _unreadable(file, error) from None
    except pickle.UnpicklingError:
        raise UserError(
            f"--weights {file}: is no torch file, or holds more than tensors, which could run "
            "code; save a state_dict() or safetensors"
        ) from None
    found = _state_dict(values)
    if found is None:
        seen = f" (it holds {listed(list(map(str, values)))})" if isinstance(values, dict) else ""
        raise UserError(f"--weights {file}: holds no state_dict(); save one, or safetensors{seen}")
    for name, value in found.items():
        if value.isnan().any():
            raise UserError(
                f"--weights {file}: {name} holds NaN, {int(value.isnan().sum()):,} of "
                f"{value.numel():,} values; use weights from before that"
            )
    return found


def _numbers() -> list[Any]:
    """Return what NumPy's numbers are read with, which scripts save beside weights as accuracies.

    None of it runs code of the file's.
    """
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in "?bhilqBHILQefd"}
    # By the name that it had before NumPy 2, too.
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]


def _state_dict(values: Any) -> dict[str, Tensor] | None:
    """Return the weights in what a torch file holds, by the keys that training scripts use."""
    import torch

    if not isinstance(values, dict):
        return None
    if values and all(torch.is_tensor(value) for value in values.values()):
        return values
    inner = (_state_dict(values.get(key)) for key in _CONTAINERS)
    return next(filter(None, inner), None)


def is_damaged(content: bytes) -> bool:
    """Return whether a file ends with a checksum, as a run's checkpoints do, that is wrong."""
    body, comment = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    if not comment.startswith(CHECKSUM_MARK):
        return False
    return hashlib.sha256(body).hexdigest().encode() != comment[len(CHECKSUM_MARK) :]


def file_of(file: str | Path) -> AnyPath:
    """Return the file of weights that a path names; a folder, e.g. a run's, has one in it.

    Raises:
        UserError: it has none.
    """
    path = at(file)
    if not path.is_dir():
        return path
    if (found := in_folder(path)) is not None:
        return found
    raise UserError(
        f"--weights {file}: the folder holds neither {' nor '.join(_IN_FOLDERS)}; name a file, or "
        "a run that has done an epoch"
    )


def in_folder(folder: AnyPath) -> AnyPath | None:
    """Return the file of weights in a folder, a run's or one of the Hub's; None without one."""
    return next((folder / name for name in _IN_FOLDERS if (folder / name).is_file()), None)


def shapes_of(weights: Mapping[str, Tensor]) -> Shapes:
    """Return the shapes of weights by name."""
    return {name: tuple(value.shape) for name, value in weights.items()}


def check_readable(file: str | Path) -> None:
    """Check, without torch, as much of a file of weights as that allows.

    A safetensors file on a disk is checked for a valid header; any other for being there and not
    empty, since what is in it takes torch.

    Raises:
        UserError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = file_of(file)
    try:
        if isinstance(path, StorePath):
            found = path.is_file()
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):
                return
        else:
            with path.open("rb") as opened:
                found = bool(opened.read(1))
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from None
    if not found:
        raise _unreadable(file, EOFError("it is empty, or not there"))


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
