"""What a run is: every setting with its unit, its default and its check.

A setting has one name everywhere: the field here, the YAML key, and the flag (with hyphens).
This module loads neither torch nor Ray, so that ``--help`` and every refusal are quick.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import yaml

from cifar_dist.config.fields import (
    DURATION,
    Ranges,
    as_duration,
    check_ranges,
    coerce_fields,
    finite,
    in_seconds,
    unknown_name,
    whole_or_fraction,
)
from cifar_dist.config.presets import PRESETS
from cifar_dist.errors import UserError
from cifar_dist.registry import (
    AUGMENTATIONS,
    DATASETS,
    LOGGERS,
    NETWORKS,
    OPTIMIZERS,
    SCHEDULES,
    dataset_traits,
)
from cifar_dist.storage import at

if TYPE_CHECKING:
    DatasetName: TypeAlias = str
    NetworkName: TypeAlias = str
    AugmentationName: TypeAlias = str
    OptimizerName: TypeAlias = str
    ScheduleName: TypeAlias = str
    LoggerName: TypeAlias = str
else:  # choices, for the command line and for the check of types
    DatasetName = Literal[tuple(DATASETS)]
    NetworkName = Literal[tuple(NETWORKS)]
    AugmentationName = Literal[tuple(AUGMENTATIONS)]
    OptimizerName = Literal[tuple(OPTIMIZERS)]
    ScheduleName = Literal[tuple(SCHEDULES)]
    LoggerName = Literal[("none", *LOGGERS)]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every setting of a training run. Immutable; made by flags, by YAML or in Python.

    Settings whose default depends on another one (``data_dir``, ``flip``,
    ``gpus_per_worker``) hold their final value once the object exists.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
    """

    preset: Literal["notebook", "cifar", "cifar-long"] | None = None
    """Start from a named set of settings: notebook (the defaults with ImageNet weights), cifar (3x3
    stem, SGD, one cycle, averaged weights; 15 epochs) or cifar-long (the same in 60 epochs)."""
    dataset: DatasetName = "cifar10"
    """cifar10, or digits: scikit-learn's 1,797 handwritten digits, enlarged to 32x32; no
    download."""
    data_dir: str | None = None
    """Folder with CIFAR-10: the official archive or Parquet files; what is missing is downloaded
    there (default: $CIFAR_DIST_DATA, else data)."""
    num_workers: int | str = 1
    """DDP workers; MIN:MAX makes the run elastic; 0 trains in this process without Ray."""
    use_gpu: bool = False
    """Give each worker a GPU."""
    cpus_per_worker: float = 1.0
    """CPUs that each worker reserves; fractions allowed."""
    gpus_per_worker: float | None = None
    """GPUs that each worker reserves; fractions share a GPU (default: 1 with --use-gpu, else 0)."""
    batch_size: int = 128
    """Images an optimizer step sees over all workers, whatever their number."""
    max_epochs: int = 30
    """Epochs in all."""
    lr: float = 1e-3
    """Learning rate: the first one of steplr, the highest one of onecycle."""
    weight_decay: float = 1e-2
    """Weight decay of the optimizer."""
    decay_norm_bias: bool = True
    """Apply weight decay to biases and to the parameters of normalisation layers too."""
    step_size: int = 10
    """StepLR: epochs between two drops of the learning rate."""
    gamma: float = 0.5
    """StepLR: what the learning rate is multiplied by at a drop."""
    optimizer: OptimizerName = "adamw"
    """adamw, or sgd with Nesterov momentum 0.9."""
    schedule: ScheduleName = "steplr"
    """Learning rate schedule: steplr by epoch, onecycle by step."""
    warmup_epochs: float | None = None
    """onecycle: epochs over which the learning rate rises (default: 30 % of --max-epochs, or 20 %
    with --anneal linear)."""
    anneal: Literal["cosine", "linear"] = "cosine"
    """onecycle: the curve that the learning rate follows up and down."""
    final_lr_factor: float = 4e-6
    """onecycle: learning rate of the last step as a share of --lr; 0 ends at zero."""
    augment: AugmentationName = "crop-flip"
    """Augmentation of training images: crop-flip (pad, crop at random, flip; --crop-padding,
    --flip), or none; --cutout besides."""
    crop_padding: int = 4
    """Random crop: pixels of padding on each side; 0 for none."""
    crop_padding_mode: Literal["constant", "reflect"] = "constant"
    """Random crop: what the padding shows: constant (black), or reflect (the image, mirrored at its
    edge)."""
    flip: float | None = None
    """Probability of a horizontal flip (default: 0.5; 0 where a mirrored image is no longer one of
    its class, as of digits)."""
    cutout: int = 0
    """Side of the square that cutout blanks, in pixels; 0 for none."""
    label_smoothing: float = 0.0
    """Shard of the target spread over all classes."""
    ema: float = 0.0
    """Decay per step of the exponential moving average of the weights, which is then what is
    evaluated and kept; 0 for none."""
    network: NetworkName = "resnet18"
    """The network: torchvision's ResNet-18."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers: torchvision's own (7x7, stride 2, max-pool), or cifar (3x3, stride 1, no
    max-pool)."""
    weights: str = "none"
    """Starting weights: none, imagenet, or a file (.pth or .safetensors)."""
    image_size: int = 32
    """Side that images are resized to on the device, in pixels."""
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    """Floating-point precision of the forward and backward pass."""
    tf32: bool = True
    """Convolutions in float32 may use TF32 on a GPU, as torch's default does; --no-tf32 computes
    them in full float32."""
    compile: bool = False
    """Compile the network with torch.compile."""
    channels_last: bool = False
    """Keep images and weights in channels-last memory order."""
    data_on_device: Literal["auto", "on", "off"] = "auto"
    """Keep the data set in the GPU's memory: auto does where it takes at most a quarter of what is
    free; off sends each batch while the one before it is trained on. The bits are the same."""
    seed: int = 0
    """Seed of everything random; each rank seeds its own generators with seed + rank."""
    deterministic: bool = True
    """Deterministic algorithms: the same bits on the same hardware."""
    sync_batchnorm: bool = False
    """Batch normalisation over the whole global batch; one worker and two give the same bits."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When a step's loss is not finite: stop the run, or skip that update and go on."""
    storage_path: str = "runs"
    """Folder that run directories are made in, on a cluster one that all nodes share; or an object
    store, e.g. s3://bucket/runs."""
    name: str | None = None
    """Name of the run's directory (default: made from dataset and time)."""
    resume: bool = False
    """Go on with the run of that --name, with the settings that it was started with."""
    checkpoint_every: int | str = 1
    """Epochs between two checkpoints, or steps, e.g. 200s."""
    max_failures: int = 3
    """Restarts before the run fails."""
    logger: LoggerName = "none"
    """Also tell a tracker of each epoch, by Lightning's logger for it (an extra of that name)."""
    wait_for_resources: str = "10m"
    """How long a cluster that grows by itself is waited for when it has too little: seconds, or
    90s, 10m, 2h; 0 for not at all."""
    report: bool = True
    """Draw report.html at the end."""
    verbose: bool = False
    """Show what Ray, Lightning and torch print."""

    def __post_init__(self) -> None:
        self._settle("wait_for_resources", as_duration(self.wait_for_resources))
        coerce_fields(self)
        if self.data_dir is None:
            self._settle("data_dir", os.environ.get("CIFAR_DIST_DATA") or "data")
        if self.flip is None:
            self._settle("flip", _flip(self.dataset))
        if self.gpus_per_worker is None:
            self._settle("gpus_per_worker", 1.0 if self.use_gpu else 0.0)
        check_ranges(self, _RANGES)
        self._check_together()

    def _settle(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_together(self) -> None:
        fewest, most = self.min_workers, self.max_workers
        if fewest > most or (self.elastic and fewest < 1):
            raise UserError(
                f"--num-workers {self.num_workers}: a range is MIN:MAX, 1 <= MIN <= MAX, e.g. 1:4"
            )
        if self.batch_size < 2 * most:
            raise UserError(
                f"--batch-size {self.batch_size}: {most} workers need at least 2 images each, "
                f"{2 * most} in all; raise --batch-size or lower --num-workers"
            )
        if not self.use_gpu and self.gpus_per_worker:
            raise UserError(f"--gpus-per-worker {self.gpus_per_worker:g}: add --use-gpu")
        if self.use_gpu and not self.gpus_per_worker:
            raise UserError("--gpus-per-worker 0: contradicts --use-gpu; leave one of them out")
        assert self.gpus_per_worker is not None  # see above
        if not whole_or_fraction(self.gpus_per_worker):
            raise UserError(
                f"--gpus-per-worker {self.gpus_per_worker:g}: Ray gives whole GPUs or a part of "
                f"one; use {int(self.gpus_per_worker)} or {int(self.gpus_per_worker) + 1}"
            )
        if self.precision == "16-mixed" and not self.use_gpu:
            raise UserError("--precision 16-mixed: needs --use-gpu; on CPU choose 32 or bf16-mixed")
        if self.data_on_device == "on" and not self.use_gpu:
            raise UserError("--data-on-device on: needs --use-gpu; leave it out")
        self._check_warmup()
        if self.cutout > self.image_size:
            raise UserError(f"--cutout {self.cutout}: images are {self.image_size} pixels wide")
        if self.resume and self.name is None:
            raise UserError("--resume: say which run to go on with, --name NAME")

    def check_image_side(self, side: int) -> None:
        """Check the settings that must fit the images of the data set.

        Args:
            side: height and width of every image, in pixels.

        Raises:
            UserError: one does not.
        """
        if self.crop_padding > side:
            raise UserError(
                f"--crop-padding {self.crop_padding}: images are {side} pixels wide; lower it"
            )
        if self.crop_padding_mode == "reflect" and self.crop_padding > side - 1:
            raise UserError(
                f"--crop-padding {self.crop_padding}: --crop-padding-mode reflect has {side - 1} "
                f"pixels to show beside an edge of {side}; lower it"
            )

    def _check_warmup(self) -> None:
        if self.warmup_epochs is None:
            return
        if not SCHEDULES.about(self.schedule).has_warmup:
            others = ", ".join(name for name in SCHEDULES if SCHEDULES.about(name).has_warmup)
            raise UserError(
                f"--warmup-epochs {self.warmup_epochs:g}: --schedule {self.schedule} has no "
                f"warm-up; choose another --schedule ({others}), or omit --warmup-epochs"
            )
        if self.warmup_epochs >= self.max_epochs:
            raise UserError(
                f"--warmup-epochs {self.warmup_epochs:g}: must be below --max-epochs "
                f"{self.max_epochs}, so that the learning rate falls again; lower it"
            )

    @classmethod
    def unsettled(cls, settings: Mapping[str, Any]) -> TrainConfig:
        """Defaults under the given settings, unchecked, with what depends on others still open.

        Only good for a command-line parser, which lays flags over it before anything follows
        from anything.
        """
        defaults = object.__new__(cls)
        for field in dataclasses.fields(cls):
            object.__setattr__(defaults, field.name, settings.get(field.name, field.default))
        return defaults

    @property
    def min_workers(self) -> int:
        """Fewest DDP workers the run goes on with."""
        return int(str(self.num_workers).split(":")[0])

    @property
    def max_workers(self) -> int:
        """Most DDP workers the run uses."""
        return int(str(self.num_workers).split(":")[-1])

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while the run lasts."""
        return ":" in str(self.num_workers)

    @property
    def checkpoint_epochs(self) -> int | None:
        """Epochs between two checkpoints; None where steps are counted."""
        every = str(self.checkpoint_every)
        return None if every.endswith("s") else int(every)

    @property
    def checkpoint_steps(self) -> int | None:
        """Optimizer steps between two checkpoints; None where epochs are counted."""
        every = str(self.checkpoint_every)
        return int(every[:-1]) if every.endswith("s") else None

    @property
    def wait_for_resources_s(self) -> float:
        """`wait_for_resources` in seconds."""
        return in_seconds(self.wait_for_resources)

    def computes(self) -> dict[str, Any]:
        """The settings, by name, that decide what the run computes; all others say where and how
        long it runs."""
        return {k: v for k, v in self.to_dict().items() if k not in MAY_CHANGE_ON_RESUME}

    def to_dict(self) -> dict[str, Any]:
        """Every setting by name, as plain values that YAML and JSON hold."""
        return dataclasses.asdict(self)

    @staticmethod
    def reopened(settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings without those that only followed from others, so that they follow again."""
        opened = dict(settings)
        if "flip" in opened and opened["flip"] == _flip(opened.get("dataset", TrainConfig.dataset)):
            del opened["flip"]
        if opened.get("gpus_per_worker") == float(opened.get("use_gpu", False)):
            opened.pop("gpus_per_worker", None)
        return opened

    def to_yaml(self) -> str:
        """The text of ``config.yaml``."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


MAY_CHANGE_ON_RESUME = frozenset(
    {
        "num_workers",
        "use_gpu",
        "cpus_per_worker",
        "gpus_per_worker",
        "data_dir",
        "data_on_device",
        "max_epochs",
        "storage_path",
        "name",
        "resume",
        "checkpoint_every",
        "max_failures",
        "wait_for_resources",
        "logger",
        "on_nonfinite",
        "report",
        "verbose",
    }
)
"""Settings that say where and how long a run runs; all others say what it computes."""


def _flip(dataset: str) -> float:
    return 0.5 if dataset_traits(dataset).mirrored_alike else 0.0


def setting_names() -> list[str]:
    """The names of all settings, in the order of their declaration."""
    return [field.name for field in dataclasses.fields(TrainConfig)]


def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a run's own file, with the defaults of those that came after it.

    Without them its preset would supply them, as it does now and did not when the run was started.
    """
    return {field.name: field.default for field in dataclasses.fields(TrainConfig)} | dict(settings)


def make_config(settings: Mapping[str, Any], where: str = "") -> TrainConfig:
    """A config from settings by name; a ``preset`` among them supplies the others' defaults.

    Args:
        settings: values by setting name.
        where: where they came from, for messages, e.g. ``" in best.yaml"``.

    Raises:
        UserError: an unknown name (the nearest known one is suggested) or a bad value.
    """
    settings = with_preset(settings, where)
    try:
        return TrainConfig(**settings)
    except UserError as error:
        raise UserError(f"{error}{where}") from None


def with_preset(settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """The settings, over those of the preset that they name, if any.

    Raises:
        UserError: an unknown name or preset.
    """
    known = setting_names()
    for name in settings:
        if name not in known:
            raise unknown_name("setting", str(name), where, known)
    preset = settings.get("preset")
    if preset is None:
        return dict(settings)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UserError(f"--preset {preset}: choose from {', '.join(PRESETS)}{where}")
    return {**PRESETS[preset], **settings}


_RANGES: Ranges = [
    (
        "num_workers",
        lambda v: re.fullmatch(r"\d{1,6}(:\d{1,6})?", str(v)) is not None,
        "a number of workers, e.g. 4, or a range, e.g. 1:4",
    ),
    ("cpus_per_worker", lambda v: finite(v) and v > 0, "greater than 0, e.g. 1"),
    ("gpus_per_worker", lambda v: finite(v) and v >= 0, "0 or more, e.g. 0.5"),
    ("batch_size", lambda v: v >= 2, "2 or more, e.g. 128"),
    ("max_epochs", lambda v: v >= 1, "1 or more, e.g. 30"),
    ("lr", lambda v: finite(v) and v > 0, "greater than 0, e.g. 0.001"),
    ("weight_decay", lambda v: finite(v) and v >= 0, "0 or more, e.g. 0.01"),
    (
        "warmup_epochs",
        lambda v: v is None or (finite(v) and v >= 0),
        "0 epochs or more, e.g. 2.5",
    ),
    ("final_lr_factor", lambda v: 0 <= v <= 1, "a share from 0 to 1, e.g. 0"),
    ("step_size", lambda v: v >= 1, "1 epoch or more, e.g. 10"),
    ("gamma", lambda v: finite(v) and v > 0, "greater than 0, e.g. 0.5"),
    ("crop_padding", lambda v: v >= 0, "0 pixels or more, e.g. 4"),
    ("flip", lambda v: 0 <= v <= 1, "a probability from 0 to 1, e.g. 0.5"),
    ("cutout", lambda v: v >= 0, "0 pixels or more, e.g. 8"),
    ("label_smoothing", lambda v: 0 <= v < 1, "a share from 0 to below 1, e.g. 0.1"),
    ("ema", lambda v: 0 <= v < 1, "a decay from 0 to below 1, e.g. 0.99"),
    ("image_size", lambda v: 8 <= v <= 1024, "8 to 1024 pixels, e.g. 32"),
    # NumPy's generators take 32 bits, and ranks add their number to the seed.
    ("seed", lambda v: 0 <= v < 2**32 - 2**20, "from 0 to 4293918719, e.g. 0"),
    (
        "checkpoint_every",
        lambda v: re.fullmatch(r"0*[1-9]\d{0,8}s?", str(v)) is not None,
        "a number of epochs, e.g. 1, or of steps, e.g. 200s",
    ),
    ("max_failures", lambda v: v >= 0, "0 restarts or more, e.g. 3"),
    (
        "wait_for_resources",
        lambda v: re.fullmatch(DURATION, v) is not None,
        "seconds, or e.g. 90s, 10m, 2h",
    ),
    (
        "name",
        lambda v: v is None or re.fullmatch(r"[A-Za-z0-9][\w.=+-]{0,199}", v, re.ASCII),
        "letters, digits and . _ - + = only, the first a letter or digit",
    ),
    (
        "storage_path",
        lambda v: bool(v) and bool(at(v)),  # which says itself what is wrong with an address
        "a folder, or the address of an object store, e.g. s3://bucket/runs",
    ),
]


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Workers run in other directories, and ``config.yaml`` is read in others."""
    weights = config.weights
    if weights not in ("none", "imagenet"):
        weights = str(at(weights))
    data_dir = str(Path(str(config.data_dir)).expanduser().absolute())
    return dataclasses.replace(config, data_dir=data_dir, weights=weights)
