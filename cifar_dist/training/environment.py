"""Software and hardware of a run, for ``environment.json``."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("cifar-dist", "torch", "torchvision", "lightning", "torchmetrics", "ray", "numpy")


def environment() -> dict[str, Any]:
    """Return versions of everything that can change a result, and this process's hardware."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        # Read from the packages' metadata: importing torchvision or Ray for a number takes seconds.
        **{name.replace("-", "_"): _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        # Another number of threads adds in another order, which changes the last bits of a result.
        "cpu_threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        # platform.processor() names no model on Linux: it is empty, or the architecture.
        with open("/proc/cpuinfo") as lines:
            names = (
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            )
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()
