"""Parts of the GPU campaign that say what the machine is and write the data sets of the others."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time

import torch

from benchmarks import images as measured
from benchmarks.gpu_parts.here import DATA, Here

MATRIX_SIDE = {"cuda": 8192, "cpu": 256}
PRODUCTS = {"cuda": 30, "cpu": 2}


def device(here: Here) -> None:
    """Say what the machine and its software are, and how fast it multiplies matrices."""
    say = here.found.say
    packages = ("torch", "torchvision", "triton", "lightning", "torchmetrics", "ray")
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    python = sys.version.split()[0]
    say("software", f"Python {python}, {said}", versions=versions, python=python)
    say("CPU", f"{os.cpu_count()} cores", cores=os.cpu_count())
    if here.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        cuda = {
            "name": about.name,
            "memory_gib": about.total_memory / 2**30,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
        say(
            "GPU",
            f"{cuda['name']}, {cuda['memory_gib']:.0f} GiB, driver {cuda['driver']}, CUDA "
            f"{cuda['cuda']}, cuDNN {cuda['cudnn']}, NCCL {cuda['nccl']}",
            **cuda,
        )
    peak = matrix_peak(here.device)
    side = MATRIX_SIDE[here.device]
    say(f"bf16 product of {side} x {side}", f"{peak / 1e12:,.1f} TFLOP/s", matrix_peak=peak)


def _driver() -> str:
    if (program := shutil.which("nvidia-smi")) is None:
        return "unknown (no nvidia-smi)"
    words = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def matrix_peak(device: str) -> float:
    """Return the operations a second of a product of two bf16 matrices; the best of three."""
    side, count = MATRIX_SIDE[device], PRODUCTS[device]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(4):  # the first also starts the device
        synchronize(device)
        began = time.perf_counter()
        for _ in range(count):
            a @ b
        synchronize(device)
        best = max(best, count * 2 * side**3 / (time.perf_counter() - began))
    return best


def synchronize(device: str) -> None:
    """Wait until the device has done all that was queued."""
    if device == "cuda":
        torch.cuda.synchronize()


def data(here: Here) -> None:
    """Write the data sets and decode them into the cache, which later parts find there."""
    from cifar_dist.data.cache import prepare
    from cifar_dist.data.datasets import find_source

    for name, (train, test) in DATA[here.device].items():
        began = time.perf_counter()
        dataset = prepare("cifar10", find_source("cifar10", str(here.folder(name))))
        took = time.perf_counter() - began
        here.found.say(
            name,
            f"{measured.source()}, {dataset.train_images:,} images to train on, "
            f"{dataset.validation_images:,} to validate, {dataset.test_images:,} to test; "
            f"{took:.1f} s",
            **{name: {"train": train, "test": test, "seconds": took}},
        )
