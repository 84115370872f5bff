"""``python -m cifar_dist.export``: a model as a file for elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from cifar_dist.cli import parse_export, run_command
from cifar_dist.config.model import ExportConfig
from cifar_dist.config.train import with_absolute_paths
from cifar_dist.errors import RunFailed
from cifar_dist.inference.lookup import trained_config, weights_file
from cifar_dist.inference.model import model_of
from cifar_dist.storage import AnyPath, at, write_atomically
from cifar_dist.terminal.hints import shown

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx", "safetensors": ".export.safetensors"}
LOADING = {
    "torch": "torch.export.load('{file}').module()(images), images [n, {shape}] uint8",
    "onnx": "onnxruntime.InferenceSession('{file}').run(['logits'], {{'images': images}})",
    "safetensors": "safetensors.torch.load_file('{file}'), torchvision's names behind 'network.'",
}
TOLERANCE = 1e-3
"""Largest difference of a logit that is put down to rounding."""
CHUNK = 250


@dataclass(frozen=True)
class Exported:
    """What `export` returns."""

    file: AnyPath
    image_shape: tuple[int, int, int]
    """Channels, height and width of the images that the file takes."""
    images: int
    """Test images that both the model and the file were given."""
    largest_difference: float
    """Of a logit."""
    same_class: int
    """Images that both take for the same."""


def export(config: ExportConfig) -> Exported:
    """Write a model to a file, having compared the file's answers with the model's own.

    Raises:
        UserError: no such model, bad weights or data, or a format whose packages are missing.
        RunFailed: the file would answer otherwise (it is not kept), or cannot be written.
    """
    import torch

    from cifar_dist.data.cache import prepare
    from cifar_dist.data.datasets import find_source
    from cifar_dist.inference.exported import exported

    model, about = model_of(config, use_gpu=False, precision="32")
    trained = with_absolute_paths(trained_config(config))
    dataset = prepare(trained.dataset, find_source(trained.dataset, str(trained.data_dir)))
    content, answer = exported(model, about, config.format)

    images, members = dataset.part("test")
    chosen = torch.from_numpy(images.images.take(members[: config.check_images], axis=0))
    with torch.inference_mode():
        pairs = [(model.logits(part), answer(part)) for part in chosen.split(CHUNK)]
    ours, theirs = (torch.cat(logits) for logits in zip(*pairs, strict=True))
    largest = float((ours - theirs).abs().max())
    same = int((ours.argmax(1) == theirs.argmax(1)).sum())
    source = weights_file(config)
    default = source.with_name(source.name.rpartition(".")[0] + SUFFIXES[config.format])
    file = at(config.output) if config.output else default
    if not largest <= TOLERANCE:
        raise RunFailed(
            f"{file}: was not written: its logits differ from the model's by up to {largest:.2g}"
        )
    write_atomically(file, content)
    return Exported(file, (about.channels, about.side, about.side), len(chosen), largest, same)


def main(words: list[str]) -> None:
    """Parse, export, and print how the file compares."""
    config = parse_export(words)
    found = export(config)
    print(
        f"{shown(found.file)}: on {found.images:,} test images the largest difference of a logit "
        f"is {found.largest_difference:.2g}; {found.same_class:,} of {found.images:,} get the same "
        "class"
    )
    shape = ", ".join(map(str, found.image_shape))
    print(f"to load it: {LOADING[config.format].format(file=shown(found.file), shape=shape)}")


if __name__ == "__main__":
    run_command(main)
