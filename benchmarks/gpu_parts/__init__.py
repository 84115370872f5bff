"""The parts of the GPU campaign; `benchmarks.gpu_campaign` starts each as a process of its own."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.gpu_parts.here import Here
from benchmarks.gpu_parts.machine import data, device
from benchmarks.gpu_parts.profiles import checkpoints, profile
from benchmarks.gpu_parts.promises import bits, halves, nccl, tests, trials
from benchmarks.gpu_parts.speed import compiled, preset, rates, waits

RUNS: dict[str, Callable[[Here], None]] = {
    part.__name__: part
    for part in (
        device, data, tests, waits, rates, bits, preset, halves, compiled, trials, nccl,
        profile, checkpoints
    )
}  # fmt: skip
