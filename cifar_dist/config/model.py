"""The settings of ``evaluate``, ``predict`` and ``export``: uses of a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from cifar_dist.config.fields import Ranges, check_ranges, coerce_fields
from cifar_dist.config.train import DatasetName, NetworkName, TrainConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The settings that say which model it is, a run's or a file of weights. Immutable.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|WEIGHTS")]
    """A run's directory, or a file of weights (.safetensors, or what torch saved: .pth, .pt,
    .pth.tar, .bin, .ckpt)."""
    data_dir: str | None = None
    """Folder with CIFAR-10 (default: the run's; else $CIFAR_DIST_DATA, else data)."""
    dataset: DatasetName | None = None
    """For weights: the data set that they classify (default: cifar10)."""
    network: NetworkName | None = None
    """For weights: the network that they are of (default: resnet18)."""
    stem: Literal["imagenet", "cifar"] | None = None
    """For weights: the network's first layers (default: imagenet)."""
    image_size: int | None = None
    """For weights: side that images are resized to, in pixels (default: 32)."""

    def __post_init__(self) -> None:
        # Images are a tuple of words, which has no plain type to compare with.
        coerce_fields(self, but=("images",))
        check_ranges(self, self.ranges())

    @classmethod
    def ranges(cls) -> Ranges:
        """Return what must hold for the settings that this class adds."""
        return []


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelConfig):
    """Measure a run's weights, or any, on a split of the data set: each image counts once.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
    """

    split: Literal["test", "val", "train"] = "test"
    """Images to measure on: test, val (held out of training), or train (without augmentation)."""
    num_workers: int = 0
    """Workers that share the images; 0 does it in this process without Ray."""
    use_gpu: bool = False
    """Give each worker a GPU."""
    cpus_per_worker: float = 1.0
    """CPUs that each worker reserves; fractions allowed."""
    batch_size: int = 500
    """Images that go through the network at once, in one worker."""
    precision: Literal["32", "bf16-mixed", "16-mixed"] | None = None
    """Floating-point precision (default: the run's; for weights 32)."""
    format: Literal["text", "json", "csv"] = "text"
    """Output to print: text, json (everything), or csv (a row a class)."""
    output: str | None = None
    """Folder for evaluation-SPLIT.json and .csv (default: the run's; for weights none)."""
    wait_for_resources: str = TrainConfig.wait_for_resources
    """How long a cluster that grows by itself is waited for."""
    verbose: bool = False
    """Show what Ray prints."""

    @classmethod
    def ranges(cls) -> Ranges:
        return [
            ("num_workers", lambda v: v >= 0, "0 or more, e.g. 2"),
            ("batch_size", lambda v: v >= 1, "1 or more, e.g. 500"),
        ]


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ModelConfig):
    """Classify images: files, folders, or standard input.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
    """Image files of any kind and size; folders, gone through to the bottom; - for standard input:
    an image, or names of images, one a line."""
    top: int = 1
    """Classes to name for each image, the most probable first."""
    format: Literal["table", "jsonl"] = "table"
    """A line an image: aligned text, or a JSON object."""
    use_gpu: bool = False
    """Use a GPU."""
    batch_size: int = 256
    """Images that go through the network at once."""

    @classmethod
    def ranges(cls) -> Ranges:
        return [
            ("images", len, "image files or folders, or - for standard input"),
            ("top", lambda v: v >= 1, "1 class or more, e.g. 3"),
            ("batch_size", lambda v: v >= 1, "1 or more, e.g. 256"),
        ]


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelConfig):
    """Write a model, its normalisation inside, to a file that needs neither Ray nor Lightning.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
    """

    format: Literal["torch", "onnx", "safetensors"] = "torch"
    """torch (a torch.export program), onnx, or safetensors (weights, mean and std as tensors)."""
    output: str | None = None
    """The file (default: in the run's directory, or beside the weights)."""
    check_images: int = 1000
    """Test images on which the file is compared with the model before it is kept."""

    @classmethod
    def ranges(cls) -> Ranges:
        return [("check_images", lambda v: v >= 1, "1 image or more, e.g. 1000")]
