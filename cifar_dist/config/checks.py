"""The checks of a run's settings: ranges of single ones, and combinations."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cifar_dist.config.fields import (
    DURATION,
    Ranges,
    finite,
    in_seconds,
    whole_or_fraction,
)
from cifar_dist.errors import UserError
from cifar_dist.registry import SCHEDULES
from cifar_dist.storage import at

if TYPE_CHECKING:
    from cifar_dist.config.train import TrainConfig


RANGES: Ranges = [
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
        "step_timeout",
        lambda v: re.fullmatch(DURATION, v) and (in_seconds(v) == 0 or in_seconds(v) >= 10),
        "10 seconds or more, e.g. 90s, 10m, 2h, or 0 for never",
    ),
    (
        "name",
        # It becomes a folder, a part of an object's key and a word of the commands that are
        # printed: no slash, no space, and no leading hyphen, which would be read as a flag.
        lambda v: v is None or re.fullmatch(r"[A-Za-z0-9][\w.=+-]{0,199}", v, re.ASCII),
        "letters, digits and . _ - + = only, the first a letter or digit",
    ),
    (
        "storage_path",
        lambda v: bool(v) and bool(at(v)),  # which says itself what is wrong with an address
        "a folder, or the address of an object store, e.g. s3://bucket/runs",
    ),
]


def check_together(config: TrainConfig) -> None:
    """Check what settings that are each in their range must fulfil together.

    Raises:
        UserError: two of them contradict each other; the message says which, and what to do.
    """
    _check_workers(config)
    _check_gpus(config)
    _check_augmentation(config)
    _check_warmup(config)
    if config.resume and config.name is None:
        raise UserError("--resume: say which run to resume, --name NAME")


def _check_workers(config: TrainConfig) -> None:
    fewest, most = config.min_workers, config.max_workers
    if fewest > most or (config.elastic and fewest < 1):
        raise UserError(
            f"--num-workers {config.num_workers}: a range is MIN:MAX, 1 <= MIN <= MAX, e.g. 1:4"
        )
    # Batch normalisation needs two images on each worker: where a layer's output is one pixel, a
    # single image has no variance, and torch raises.
    if config.batch_size < 2 * most:
        raise UserError(
            f"--batch-size {config.batch_size}: {most} workers need at least 2 images each, "
            f"{2 * most} in all; raise --batch-size or lower --num-workers"
        )


def _check_gpus(config: TrainConfig) -> None:
    if not config.use_gpu and config.gpus_per_worker:
        raise UserError(f"--gpus-per-worker {config.gpus_per_worker:g}: add --use-gpu")
    if config.use_gpu and not config.gpus_per_worker:
        raise UserError("--gpus-per-worker 0: contradicts --use-gpu; omit one of them")
    assert config.gpus_per_worker is not None  # resolved before
    if not whole_or_fraction(config.gpus_per_worker):
        raise UserError(
            f"--gpus-per-worker {config.gpus_per_worker:g}: Ray gives whole GPUs or a part of "
            f"one; use {int(config.gpus_per_worker)} or {int(config.gpus_per_worker) + 1}"
        )
    if config.precision == "16-mixed" and not config.use_gpu:
        raise UserError("--precision 16-mixed: needs --use-gpu; on CPU choose 32 or bf16-mixed")
    if config.data_on_device == "on" and not config.use_gpu:
        raise UserError("--data-on-device on: needs --use-gpu; omit it")
    if config.cuda_graphs == "on":
        _check_cuda_graphs(config)


def _check_cuda_graphs(config: TrainConfig) -> None:
    if not config.use_gpu:
        raise UserError("--cuda-graphs on: needs --use-gpu; omit it")
    for name, why in (
        ("compile", "the compiled network has its own kernels"),
        ("sync_batchnorm", "its workers communicate within a pass"),
    ):
        if getattr(config, name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"--cuda-graphs on: contradicts {flag}, {why}; omit one of them")


def _check_augmentation(config: TrainConfig) -> None:
    if config.cutout > config.image_size:
        raise UserError(f"--cutout {config.cutout}: images are {config.image_size} pixels wide")


def check_image_side(config: TrainConfig, side: int) -> None:
    """Check the settings that must fit the images of the data set.

    Args:
        config: the run.
        side: height and width of every image, in pixels.

    Raises:
        UserError: one does not.
    """
    if config.crop_padding > side:
        raise UserError(
            f"--crop-padding {config.crop_padding}: images are {side} pixels wide; lower it"
        )
    if config.crop_padding_mode == "reflect" and config.crop_padding > side - 1:
        raise UserError(
            f"--crop-padding {config.crop_padding}: --crop-padding-mode reflect has {side - 1} "
            f"pixels to show beside an edge of {side}; lower it"
        )


def _check_warmup(config: TrainConfig) -> None:
    if config.warmup_epochs is None:
        return
    if not SCHEDULES.about(config.schedule).has_warmup:
        others = ", ".join(name for name in SCHEDULES if SCHEDULES.about(name).has_warmup)
        raise UserError(
            f"--warmup-epochs {config.warmup_epochs:g}: --schedule {config.schedule} has no "
            f"warm-up; choose another --schedule ({others}), or omit --warmup-epochs"
        )
    # Compared in epochs, as they are given: the number of steps is known only once the data are
    # read.
    if config.warmup_epochs >= config.max_epochs:
        raise UserError(
            f"--warmup-epochs {config.warmup_epochs:g}: must be below --max-epochs "
            f"{config.max_epochs}, so that the learning rate falls again; lower it"
        )
