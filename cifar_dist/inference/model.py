"""A trained network, from images as bytes to logits."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cifar_dist.config.model import ModelConfig
from cifar_dist.config.train import TrainConfig, with_absolute_paths
from cifar_dist.data.cache import DatasetInfo, prepare
from cifar_dist.data.datasets import find_source
from cifar_dist.data.transforms import Normalisation
from cifar_dist.errors import UserError
from cifar_dist.events import Listener, ignore
from cifar_dist.inference.lookup import run_of, trained_config, weights_file
from cifar_dist.model.networks import check_weights, make_network, network_weights
from cifar_dist.model.seeding import set_seed
from cifar_dist.model.weights import shapes_of

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class TrainedModel:
    """A network in evaluation mode, with the normalisation that it was trained with."""

    network: nn.Module
    normalisation: Normalisation
    device: torch.device
    precision: str = "32"
    channels_last: bool = False

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Return ``[n, classes]`` float32 logits, on the CPU, of ``[n, channels, H, W]`` bytes."""
        pixels = self.normalisation.resize(self.normalisation.apply(images.to(self.device)))
        if self.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        dtype = AUTOCAST.get(self.precision)
        mixed = torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()
        with mixed:
            found: Tensor = self.network(pixels)
        # Float32, since the callers' NumPy has no bfloat16.
        return found.float().cpu()


def load_trained(
    where: str, weights: Mapping[str, Tensor], config: TrainConfig, dataset: DatasetInfo
) -> TrainedModel:
    """Return a model with these weights, on the device that the config names.

    Seeds the process's generators and sets torch's switches for determinism, as for the run.

    Args:
        where: the weights' file, for messages.
        weights: by name.
        config: network, stem, image size, precision, device, seed.
        dataset: what it was trained on.

    Raises:
        UserError: the weights are another network's or for other classes, or there is no GPU.
    """
    set_seed(config.seed, config.deterministic, config.tf32)
    if config.use_gpu and not torch.cuda.is_available():
        raise UserError("--use-gpu: torch finds no GPU here; omit it")
    # Checked first: load_state_dict would list every layer that does not fit, over many lines.
    classes = check_weights(where, shapes_of(weights), config.network, config.stem)
    if classes not in (None, len(dataset.classes)):
        raise UserError(
            f"{where}: is for {classes} classes, and {dataset.name} has {len(dataset.classes)}"
        )
    network = make_network(config.network, len(dataset.classes), config.stem)
    network.load_state_dict(weights)
    device = torch.device("cuda" if config.use_gpu else "cpu")
    if config.channels_last:
        network = network.to(memory_format=torch.channels_last)
    return TrainedModel(
        network.to(device).eval().requires_grad_(False),
        Normalisation(dataset.mean, dataset.std, config.image_size),
        device,
        config.precision,
        config.channels_last,
    )


def model_of(
    config: ModelConfig, listener: Listener = ignore, **here: Any
) -> tuple[TrainedModel, DatasetInfo]:
    """Return the model that a config names, on this process's device, and its data set's info.

    Args:
        config: names the model.
        listener: notified of a precision that needs a GPU.
        here: how it is used, by setting of `TrainConfig`.

    Raises:
        UserError: no such model, bad weights, or, where a run does not say itself what it was
            trained on, no such data.
    """
    file = str(weights_file(config))
    trained = with_absolute_paths(trained_config(config, listener, num_workers=0, **here))
    run = run_of(config)
    saved = run and run.trained_on()
    if saved:
        # Runs of earlier versions say less; defaults of `DatasetInfo` stand for the rest.
        known = {name: saved[name] for name in DatasetInfo._fields if name in saved}
        lists = {name: tuple(saved[name]) for name in ("classes", "mean", "std")}
        about = DatasetInfo(**{**known, **lists})
    else:
        source = find_source(trained.dataset, str(trained.data_dir))
        about = prepare(trained.dataset, source, listener=listener).about
    weights = network_weights(file, trained.network, trained.stem, listener)
    return load_trained(file, weights, trained, about), about
