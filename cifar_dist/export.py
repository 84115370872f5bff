"""``python -m cifar_dist.export``: write a model to a file that other programs load."""

from __future__ import annotations

from dataclasses import dataclass

from cifar_dist.cli import parse_export
from cifar_dist.config.model import ExportConfig
from cifar_dist.config.train import with_absolute_paths
from cifar_dist.errors import RunFailed
from cifar_dist.events import Listener, ignore
from cifar_dist.exits import run_command
from cifar_dist.inference.lookup import trained_config, weights_file
from cifar_dist.storage import AnyPath, at, write_atomically
from cifar_dist.terminal.hints import message_to_stderr, shown

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx", "safetensors": ".export.safetensors"}
LOADING = {
    "torch": "torch.export.load('{file}').module()(images), images [n, {shape}] uint8",
    "onnx": "onnxruntime.InferenceSession('{file}').run(['logits'], {{'images': images}})",
    "safetensors": "safetensors.torch.load_file('{file}'), the network's names after 'network.'",
}
TOLERANCE = 1e-3
"""Largest difference of a logit that rounding explains."""
BATCH_SIZE = 250
"""Images that are compared at once."""


@dataclass(frozen=True)
class Exported:
    """The result of `export`."""

    file: AnyPath
    image_shape: tuple[int, int, int]
    """Channels, height and width of the images that the file takes."""
    images: int
    """Test images on which the file was compared with the model."""
    largest_difference: float
    """Of a logit."""
    same_class: int
    """Images for which both predict the same class."""


def export(config: ExportConfig, listener: Listener = ignore) -> Exported:
    """Write a model to a file after comparing the file's logits with the model's own.

    Args:
        config: the model and the file.
        listener: notified of what a person should know about the weights and the images.

    Raises:
        UserError: no such model, bad weights or data, or a format whose packages are missing.
        RunFailed: the file's logits differ (it is not kept), or it cannot be written.
    """
    import numpy as np

    from cifar_dist.data.cache import prepare
    from cifar_dist.data.datasets import find_source
    from cifar_dist.inference.exported import exported
    from cifar_dist.inference.model import model_of
    from cifar_dist.inference.sharded import batched_logits

    # In float32 on the CPU, whatever the run used: bfloat16's rounding alone would exceed the
    # tolerance.
    model, about = model_of(config, listener, use_gpu=False, precision="32")
    trained = with_absolute_paths(trained_config(config))
    source = find_source(trained.dataset, str(trained.data_dir))
    dataset = prepare(trained.dataset, source, listener=listener)
    content, loaded = exported(model, about, config.format)

    images, members = dataset.part("test")
    chosen = members[: config.check_images]
    ours, theirs = (
        np.concatenate([*batched_logits(each, images.images, BATCH_SIZE, chosen)])
        for each in (model.logits, loaded)
    )
    largest = float(np.abs(ours - theirs).max())
    same = int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
    weights = weights_file(config)
    # Not `with_suffix`, which a path in an object store lacks.
    default = weights.with_name(weights.name.rpartition(".")[0] + SUFFIXES[config.format])
    file = at(config.output) if config.output else default
    # This way round, since every comparison with NaN is false and such a file must not be kept.
    if not largest <= TOLERANCE:
        raise RunFailed(
            f"{file}: was not written: its logits differ from the model's by up to {largest:.2g}"
        )
    write_atomically(file, content)
    return Exported(file, (about.channels, about.side, about.side), len(chosen), largest, same)


def main(words: list[str]) -> None:
    """Parse, export, and print how the file compares with the model."""
    config = parse_export(words)
    found = export(config, message_to_stderr)
    print(
        f"{shown(found.file)}: on {found.images:,} test images the largest difference of a logit "
        f"is {found.largest_difference:.2g}; {found.same_class:,} of {found.images:,} get the same "
        "class"
    )
    shape = ", ".join(map(str, found.image_shape))
    print(f"to load it: {LOADING[config.format].format(file=shown(found.file), shape=shape)}")


if __name__ == "__main__":
    run_command(main)
