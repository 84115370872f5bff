"""Networks by the registry's name: made, started from weights, and compared with weights.

An entry of `cifar_dist.registry.NETWORKS` is called with the number of classes and returns a module
from ``[B, 3, H, W]`` float images to ``[B, classes]`` logits. It may declare

- a parameter ``stem``, where it has other first layers for small images;
- an attribute ``torchvision_name``, where torchvision has ImageNet weights for it.

At import this loads no torch, and neither does `check_network`, so that the driver refuses quickly.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, get_args, get_type_hints

from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import UserError
from cifar_dist.events import Listener, Warned, ignore
from cifar_dist.model.weight_names import listed, nearest, renamed
from cifar_dist.model.weights import (
    Shapes,
    check_readable,
    imagenet_weights,
    is_downloaded,
    read_weights,
    shapes_of,
)
from cifar_dist.registry import NETWORKS

if TYPE_CHECKING:
    from torch import Tensor, nn

COUNTER = "num_batches_tracked"
"""Ends the name of batch normalisation's counter of batches."""


def make_network(
    name: str, num_classes: int, stem: str = TrainConfig.stem, weights: str = "none"
) -> nn.Module:
    """Make a network.

    Args:
        name: in the registry.
        num_classes: outputs of its last layer.
        stem: its first layers, where it has a choice of them.
        weights: ``none`` (random, from torch's generator), ``imagenet`` (torchvision's,
            downloaded when missing), or a file. Layers whose shape depends on the number of
            classes stay random where the weights are for another number.

    Raises:
        UserError: the weights cannot be had or are another network's, or it has no such stem.
    """
    network = _make(name, num_classes, stem)
    if weights != "none":
        if weights == "imagenet":
            values = imagenet_weights(_torchvision_name(name))
            check_weights(weights, shapes_of(values), name, stem)
        else:
            values = network_weights(weights, name, stem)
        # The network's own values stay where the file's do not fit: in a last layer for another
        # number of classes.
        own = network.state_dict()
        fitting = {key: v for key, v in values.items() if v.shape == own[key].shape}
        network.load_state_dict({**own, **fitting})
    return network


def network_weights(
    file: str, name: str, stem: str, listener: Listener = ignore
) -> dict[str, Tensor]:
    """Read a network's weights and statistics, whatever program wrote them and wrapped their names.

    Args:
        file: see `read_weights`.
        name: the network's.
        stem: its first layers.
        listener: notified of what was changed in names, in one line.

    Raises:
        UserError: the file cannot be used, or is of another network.
    """
    import torch

    values, expected = read_weights(file), network_shapes(name, 10, stem)
    names, note = renamed(values, expected)
    found = {to: values[name] for name, to in names.items()}
    check_weights(file, shapes_of(found), name, stem)
    if note:
        listener(Warned(f"--weights {file}: {note}"))
    # Files of old versions of torch have no counters of batches, which nothing here uses.
    counters = {key: torch.tensor(0) for key in expected if key.endswith(COUNTER)}
    return {**counters, **found}


def network_shapes(name: str, num_classes: int, stem: str = TrainConfig.stem) -> Shapes:
    """Return the shapes of a network's weights and statistics.

    It is made on torch's meta device: no memory is allocated, and no generator advances.
    """
    import torch

    with torch.device("meta"):
        return shapes_of(_make(name, num_classes, stem).state_dict())


def check_weights(
    where: str, found: Mapping[str, tuple[int, ...]], name: str, stem: str
) -> int | None:
    """Check that weights are a network's; they may be for any number of classes.

    Args:
        where: the weights' file, for messages.
        found: their shapes.
        name: the network's.
        stem: its first layers.

    Returns:
        The number of classes; None for a network that is the same for any number.

    Raises:
        UserError: a layer is missing, unknown or of another shape; the message names the first.
    """
    classes, difference = _compared(found, name, stem)
    if not difference:
        return classes
    options = "".join(f" --{option} {value}" for option, value in _options(name, stem).items())
    said = f"--weights {where}: is not for --network {name}{options}: {difference}"
    for other in get_args(get_type_hints(TrainConfig)["stem"]):
        if _options(name, stem) and not _compared(found, name, other)[1]:
            raise UserError(f"{said}; it is for --stem {other}")
    raise UserError(f"{said}; use another file")


def _compared(found: Mapping[str, tuple[int, ...]], name: str, stem: str) -> tuple[int | None, str]:
    """Return for how many classes weights are, and how they differ from a network's, if so."""
    classes = _classes(found, name, stem)
    expected = network_shapes(name, classes or 10, stem)
    # Files of old versions of torch have no counters.
    missing = [key for key in expected if key not in found and not key.endswith(COUNTER)]
    unknown = [key for key in found if key not in expected]
    if missing:
        names = f"expected {listed(missing)}"
        if unknown:
            near = nearest(missing[0], unknown)
            others = [key for key in unknown if key not in near]
            names += f"; found instead, the nearest first, {listed([*near, *others])}"
        return classes, f"it has no {missing[0]} ({names})"
    for key, shape in expected.items():
        if key in found and tuple(found[key]) != shape:
            return classes, f"its {key} is {list(found[key])}, not {list(shape)}"
    return classes, f"it has {listed(unknown)}" if unknown else ""


def check_network(config: TrainConfig) -> None:
    """Check what can be checked of network and starting weights without torch.

    Raises:
        UserError: the network has no such stem, a file cannot be read, or ImageNet weights are
            not known or cannot be downloaded.
    """
    _options(config.network, config.stem)
    if config.weights == "imagenet":
        known = _torchvision_name(config.network)
        # Weights that are here are not read: that would load torch and delay every refusal.
        if not is_downloaded(known):
            imagenet_weights(known)
    elif config.weights != "none":
        check_readable(config.weights)


def check_starting_weights(config: TrainConfig, listener: Listener = ignore) -> None:
    """Check that the starting weights, where they are a file, are the network's; loads torch.

    Args:
        config: the run.
        listener: notified of what is changed in their names.

    Raises:
        UserError: they are another network's, or no weights.
    """
    if config.weights not in ("none", "imagenet"):
        network_weights(config.weights, config.network, config.stem, listener)


def _make(name: str, num_classes: int, stem: str) -> nn.Module:
    network: nn.Module = NETWORKS[name](num_classes, **_options(name, stem))
    return network


def _options(name: str, stem: str) -> dict[str, str]:
    """Return the settings that a network declares as parameters.

    Raises:
        UserError: a setting that it does not declare is not at its default.
    """
    if "stem" in inspect.signature(NETWORKS[name]).parameters:
        return {"stem": stem}
    if stem != TrainConfig.stem:
        raise UserError(f"--stem {stem}: --network {name} has one stem only; omit --stem")
    return {}


def _torchvision_name(name: str) -> str:
    known: str | None = getattr(NETWORKS[name], "torchvision_name", None)
    if known is None:
        raise UserError(
            f"--weights imagenet: there are none for --network {name}; give a file, or none"
        )
    return known


def _classes(found: Mapping[str, tuple[int, ...]], name: str, stem: str) -> int | None:
    """Return for how many classes weights are.

    The last layer is what differs between networks for two numbers of classes, so that no network
    has to name it.
    """
    ten, eleven = (network_shapes(name, classes, stem) for classes in (10, 11))
    for key, shape in ten.items():
        for axis, (size, other) in enumerate(zip(shape, eleven[key], strict=True)):
            if size != other and axis < len(found.get(key, ())):
                return found[key][axis]
    return None
