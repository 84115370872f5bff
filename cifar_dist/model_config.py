"""What is done with a trained model: the settings of ``evaluate``, ``predict`` and ``export``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cifar_dist.config import Ranges, TrainConfig, check_ranges, coerce_fields, flag, make_config
from cifar_dist.errors import UserError
from cifar_dist.events import Listener, ignore
from cifar_dist.runs import RunDirectory
from cifar_dist.storage import AnyPath, at

WEIGHTS = (".safetensors", ".pth", ".pt")
NO_HALF_ON_CPU = "the run was trained in 16-mixed, which needs a GPU; computing in float32"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The settings that say which model it is, a run's or a file of weights. Immutable.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|WEIGHTS")]
    """A run's directory, or a file of weights (.safetensors or .pth)."""
    data_dir: str | None = None
    """Folder with CIFAR-10 (default: the run's; else $CIFAR_DIST_DATA, else data)."""
    dataset: Literal["cifar10", "digits"] | None = None
    """For weights: the data set that they classify (default: cifar10)."""
    stem: Literal["imagenet", "cifar"] | None = None
    """For weights: the network's first layers (default: imagenet)."""
    image_size: int | None = None
    """For weights: side that images are resized to, in pixels (default: 32)."""

    def __post_init__(self) -> None:
        coerce_fields(self, but=("images",))
        check_ranges(self, self.ranges())

    @classmethod
    def ranges(cls) -> Ranges:
        """What must hold for the settings that this class adds."""
        return []

    @property
    def run(self) -> RunDirectory | None:
        """The run whose weights they are; None for a file of weights of its own."""
        folder = at(self.model)
        if folder.name == "model.safetensors":
            folder = folder.parent
        found = RunDirectory(folder)
        return found if found.config_file.is_file() else None

    @property
    def weights_file(self) -> AnyPath:
        """The file with the weights.

        Raises:
            UserError: there is none.
        """
        run = self.run
        file = run.model_file if run else at(self.model)
        if file.is_file() and (run or file.name.endswith(WEIGHTS)):
            return file
        if run:
            raise UserError(f"{self.model}: the run has not done an epoch yet; train it first")
        wanted = "give a run's directory, e.g. runs/first, or a .safetensors or .pth file"
        problem = "is neither a run nor weights" if file.exists() else "there is no such file"
        raise UserError(f"{self.model}: {problem}; {wanted}")

    def trained(self, listener: Listener = ignore, **here: Any) -> TrainConfig:
        """The settings that the weights were trained with, as far as using them needs them.

        Args:
            listener: notified where float32 stands in for a precision that needs a GPU.
            here: how they are used, by setting: workers, GPU, precision; None for the run's.

        Raises:
            UserError: the run's settings cannot be read, or contradict these.
        """
        given = {name: getattr(self, name) for name in ("data_dir", *_OF_THE_NETWORK)}
        given = {k: v for k, v in {**here, **given}.items() if v is not None}
        given["gpus_per_worker"] = None  # follows from use_gpu
        least = 2 * int(given.get("num_workers", 0))  # images of a batch, which is not used
        if (run := self.run) is None:
            return make_config({**given, "batch_size": max(TrainConfig.batch_size, least)})
        config = run.read_config()
        for name in _OF_THE_NETWORK:
            if given.get(name, before := getattr(config, name)) != before:
                raise UserError(
                    f"{flag(name)} {given[name]}: the run was trained with {before}; leave "
                    f"{flag(name)} out"
                )
        if not Path(str(config.data_dir)).is_dir():  # trained on another machine
            given.setdefault("data_dir", TrainConfig().data_dir)
        on_gpu = given.get("use_gpu", config.use_gpu)
        if config.precision == "16-mixed" and not on_gpu and "precision" not in given:
            given["precision"] = "32"
            listener({"kind": "warning", "message": NO_HALF_ON_CPU})
        given["batch_size"] = max(config.batch_size, least)
        return dataclasses.replace(config, **given)


_OF_THE_NETWORK = ("dataset", "stem", "image_size")


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
    """What is printed: text, json (everything), or csv (a row a class)."""
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
