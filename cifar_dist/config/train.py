"""The settings of a run: each with its unit, its default and its check.

A setting has one name everywhere: the field here, the YAML key, and the flag (with hyphens).
This module loads neither torch nor Ray, so that ``--help`` and every refusal are quick.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from cifar_dist.config.checks import RANGES, check_together
from cifar_dist.config.fields import (
    Resolved,
    as_duration,
    check_ranges,
    coerce_fields,
    in_seconds,
    settings_as_yaml,
    unknown_name,
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
from cifar_dist.storage import at, on_disk

if TYPE_CHECKING:
    DatasetName: TypeAlias = str
    NetworkName: TypeAlias = str
    AugmentationName: TypeAlias = str
    OptimizerName: TypeAlias = str
    ScheduleName: TypeAlias = str
    LoggerName: TypeAlias = str
else:  # choices: for the command line as of now, for the check of types also those added later
    DatasetName = Annotated[Literal[tuple(DATASETS)], DATASETS]
    NetworkName = Annotated[Literal[tuple(NETWORKS)], NETWORKS]
    AugmentationName = Annotated[Literal[tuple(AUGMENTATIONS)], AUGMENTATIONS]
    OptimizerName = Annotated[Literal[tuple(OPTIMIZERS)], OPTIMIZERS]
    ScheduleName = Annotated[Literal[tuple(SCHEDULES)], SCHEDULES]
    LoggerName = Annotated[Literal[("none", *LOGGERS)], LOGGERS]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Resolved):
    """Every setting of a training run. Immutable; made by flags, by YAML or in Python.

    ``data_dir``, ``flip`` and ``gpus_per_worker`` follow from others where they are not given.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
    """

    preset: Literal["notebook", "cifar", "cifar-long"] | None = None
    """Start from a named set of settings: notebook (the defaults with ImageNet weights), cifar (3x3
    stem, SGD, one cycle, averaged weights; 15 epochs) or cifar-long (the same in 60 epochs)."""
    dataset: DatasetName = "cifar10"
    """cifar10, cifar100 (its 100 fine labels), or digits: scikit-learn's 1,797 handwritten digits,
    enlarged to 32x32; no download."""
    data_dir: str | None = None
    """Folder with the data set: the official archive or Parquet files; what is missing is
    downloaded there (default: $CIFAR_DIST_DATA, else data)."""
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
    """Learning rate: the first one of steplr, the highest one of onecycle and cosine."""
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
    """Learning rate schedule: steplr by epoch, onecycle and cosine by step."""
    warmup_epochs: float | None = None
    """onecycle, cosine: epochs over which the learning rate rises (default: of onecycle 30 % of
    --max-epochs, or 20 % with --anneal linear; of cosine 0)."""
    anneal: Literal["cosine", "linear"] = "cosine"
    """onecycle: the curve that the learning rate follows up and down."""
    final_lr_factor: float = 4e-6
    """onecycle, cosine: learning rate of the last step as a share of --lr; 0 ends at zero."""
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
    """Share of the target spread over all classes."""
    ema: float = 0.0
    """Decay per step of the exponential moving average of the weights, which is then what is
    evaluated and kept; 0 for none."""
    network: NetworkName = "resnet18"
    """The network: one of torchvision's ResNets."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers: torchvision's own (7x7, stride 2, max-pool), or cifar (3x3, stride 1, no
    max-pool)."""
    weights: str = "none"
    """Starting weights: none, imagenet, a file (.safetensors, or what torch saved: .pth, .pt,
    .pth.tar, .bin, .ckpt), or a run's directory."""
    image_size: int = 32
    """Side that images are resized to on the device, in pixels."""
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    """Floating-point precision of the forward and backward pass."""
    tf32: bool = True
    """Convolutions in float32 may use TF32 on a GPU, as torch's default does; --no-tf32 computes
    them in full float32."""
    compile: bool = False
    """Compile the network with torch.compile."""
    cuda_graphs: Literal["auto", "on", "off"] = "off"
    """Replay the network's passes over full batches from CUDA graphs, for a GPU that waits for its
    host; auto does in one worker on a GPU, with neither --compile nor --sync-batchnorm. The bits
    are the same."""
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
    """When a step's loss is not finite: stop the run, or skip that update and continue."""
    storage_path: str = "runs"
    """Folder that run directories are made in, on a cluster one that all nodes share; or an object
    store, e.g. s3://bucket/runs."""
    name: str | None = None
    """Name of the run's directory (default: made from dataset and time)."""
    resume: bool = False
    """Resume the run of that --name, with the settings that it was started with."""
    checkpoint_every: int | str = 1
    """Epochs between two checkpoints, or steps, e.g. 200s."""
    max_failures: int = 3
    """Restarts before the run fails."""
    step_timeout: str = "10m"
    """Time without a step after which workers count as failed, and are restarted: seconds, or 90s,
    10m, 2h; ten times the usual step's time where that is more; 0 for never. With workers under
    Ray."""
    logger: LoggerName = "none"
    """Also log each epoch to a tracker, by Lightning's logger for it (an extra of that name)."""
    wait_for_resources: str = "10m"
    """How long a cluster that grows by itself is waited for when it has too little: seconds, or
    90s, 10m, 2h; 0 for not at all."""
    report: bool = True
    """Draw report.html at the end."""
    verbose: bool = False
    """Show what Ray, Lightning and torch print."""

    def __post_init__(self) -> None:
        # YAML reads 90 as a number, where a flag gives text.
        for name in ("wait_for_resources", "step_timeout"):
            object.__setattr__(self, name, as_duration(getattr(self, name)))
        # Types first: derived values follow from the other settings, and ranges hold for them too.
        coerce_fields(self)
        # An empty variable counts as none.
        self._derive("data_dir", os.environ.get("CIFAR_DIST_DATA") or "data", "$CIFAR_DIST_DATA")
        alike = dataset_traits(self.dataset).mirrored_alike
        self._derive("flip", 0.5 if alike else 0.0, "the data set")
        self._derive("gpus_per_worker", 1.0 if self.use_gpu else 0.0, "use_gpu")
        check_ranges(self, RANGES)
        check_together(self)

    @property
    def min_workers(self) -> int:
        """Fewest DDP workers that the run continues with."""
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

    @property
    def step_timeout_s(self) -> float:
        """`step_timeout` in seconds; 0 for never."""
        return in_seconds(self.step_timeout)

    def computes(self) -> dict[str, Any]:
        """Return the settings, by name, that decide what the run computes; all others say where
        and how long it runs."""
        return {k: v for k, v in self.to_dict().items() if k not in MAY_CHANGE_ON_RESUME}

    def to_yaml(self) -> str:
        """Return the text of ``config.yaml``, with absolute paths."""
        return settings_as_yaml(with_absolute_paths(self))


MAY_CHANGE_ON_RESUME = frozenset(
    {
        # A global batch has the same images and augmentation with any number of workers, so a run
        # may move to other hardware.
        "num_workers",
        "use_gpu",
        "cpus_per_worker",
        "gpus_per_worker",
        # The same data may lie elsewhere: a resumed run compares their fingerprint instead.
        "data_dir",
        "data_on_device",
        "cuda_graphs",
        # More epochs continue a run. A schedule that spans the run refuses them when it is resumed
        # (`Schedule.needs_horizon`).
        "max_epochs",
        "storage_path",
        "name",
        "resume",
        "checkpoint_every",
        "max_failures",
        "wait_for_resources",
        "step_timeout",
        "logger",
        # A run that diverged would diverge again: it is resumed with `skip`.
        "on_nonfinite",
        "report",
        "verbose",
    }
)
"""Settings that say where and how long a run runs; all others say what it computes."""


def setting_names() -> list[str]:
    """Return the names of all settings, in the order of their declaration."""
    return [field.name for field in dataclasses.fields(TrainConfig)]


def make_config(settings: Mapping[str, Any], where: str = "") -> TrainConfig:
    """Make a config of settings by name; a ``preset`` among them supplies the others' defaults.

    Args:
        settings: values by setting name.
        where: where they came from, for messages, e.g. ``" in best.yaml"``.

    Raises:
        UserError: an unknown name (the nearest known one is suggested) or a bad value.
    """
    # Names are checked before the constructor sees them: it would raise a TypeError for an unknown
    # one.
    settings = with_preset(settings, where)
    try:
        return TrainConfig(**settings)
    except UserError as error:
        raise UserError(f"{error}{where}") from None


def with_preset(settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return the settings over those of the preset that they name, if any.

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


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return the config with paths that mean the same elsewhere.

    Workers run in other directories, ``config.yaml`` is read in others, and another process may
    have another ``$CIFAR_DIST_DATA``.
    """
    weights = config.weights
    if weights not in ("none", "imagenet"):
        weights = str(at(weights))
    data_dir = str(on_disk(str(config.data_dir)))
    return config.replace(data_dir=data_dir, weights=weights)
