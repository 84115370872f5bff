"""Named sets of settings."""

from typing import Any

_CIFAR: dict[str, Any] = {
    "stem": "cifar",
    "optimizer": "sgd",
    "schedule": "onecycle",
    "max_epochs": 15,
    "anneal": "linear",
    "final_lr_factor": 0.0,
    "lr": 0.4,
    "weight_decay": 5e-4,
    "decay_norm_bias": False,
    "ema": 0.99,
    "batch_size": 512,
    "crop_padding_mode": "reflect",
    "cutout": 8,
    "label_smoothing": 0.1,
    "precision": "bf16-mixed",
    "channels_last": True,
    "cuda_graphs": "auto",
}
# The common part of fast recipes for such networks. Batch, highest rate, cutout, weight decay are
# those of Page's cifar10-fast (myrtle.ai, How to Train Your ResNet), reflect padding and a rise
# over a fifth of the run those of hlb-CIFAR10; the averages of both decay by about 0.99 a step.

PRESETS: dict[str, dict[str, Any]] = {
    "notebook": {"weights": "imagenet"},
    "cifar": _CIFAR,
    # Four times the steps: the average may remember more of them, and cutout may hide more, as both
    # recipes do in their long forms.
    "cifar-long": {**_CIFAR, "max_epochs": 60, "ema": 0.995, "cutout": 12},
}
"""Settings by preset; what a preset does not name keeps its default."""
