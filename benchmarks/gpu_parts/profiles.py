"""Parts of the GPU campaign that say where time goes: in a step, and beside a checkpoint."""

from __future__ import annotations

import cProfile
import io
import itertools
import pstats
import statistics
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.gpu_parts.here import Here
from benchmarks.gpu_parts.machine import synchronize
from benchmarks.gpu_parts.speed import epoch_clock, settings_of

PROFILED = {"cuda": (5, 15), "cpu": (1, 3)}
"""First step of the second epoch that torch's profiler sees, and the first that it does not."""
LINES = 40
CHECKPOINT_EPOCHS = {"cuda": 9, "cpu": 5}


def profile(here: Here) -> None:
    """Say how long the device computes in a step, and what the host does; tables in the log."""
    ways: dict[str, dict[str, Any]] = {"as it is": {}}
    if here.device == "cuda":
        ways |= {"CUDA graphs": {"cuda_graphs": "on"}, "compiled": {"compile": True}}
    size = 512 if here.device == "cuda" else 32
    for name, more in ways.items():
        seen = Profiled(here.device)
        settings = {**settings_of(here, size), **more, "deterministic": False, "max_epochs": 3}
        with_callback(here, f"profile-{name.replace(' ', '-')}", settings, seen)
        print(f"\n--- {name}\n{seen.host()}\n{seen.device_table()}", flush=True)
        here.found.say(f"batch {size}, bf16, channels-last: {name}", seen.summary())


def checkpoints(here: Here) -> None:
    """Say how much longer an epoch takes in which the checkpoint before it is written."""
    clock = epoch_clock(here.device)
    size = 512 if here.device == "cuda" else 32
    settings = {
        **settings_of(here, size), "deterministic": False, "checkpoint_every": 2,
        "max_epochs": CHECKPOINT_EPOCHS[here.device],
    }  # fmt: skip
    rows = with_callback(here, "checkpoints", settings, clock).history
    seconds: dict[bool, list[float]] = {True: [], False: []}
    best = -1.0
    for before, took in itertools.islice(zip(rows, clock.seconds[1:], strict=False), 1, None):
        saved = before["epoch"] % 2 == 0 or before["val_accuracy"] > best
        best = max(best, before["val_accuracy"])
        seconds[saved].append(1000 * took)
    said = [
        f"{statistics.median(each):.0f} ms ({len(each)} epochs) {what}"
        for what, each in (("beside one", seconds[True]), ("beside none", seconds[False]))
        if each
    ]
    here.found.say("an epoch's training", ", ".join(said), seconds=seconds[True] + seconds[False])


def with_callback(here: Here, name: str, settings: dict[str, Any], callback: pl.Callback) -> Any:
    """Train with one more callback; return `fit`'s outcome."""
    from benchmarks.waits import callback_added

    with callback_added(callback):
        return here.fitted(name, "rates", settings, test=False)


class Profiled(pl.Callback):
    """Callback that profiles some steps of the second epoch by torch, the third epoch by Python."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._first, self._end = PROFILED[device]
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._torch = torch.profiler.profile(activities=activities)
        self._python = cProfile.Profile()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            self._python.enable()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, step: int) -> None:
        if trainer.current_epoch == 1 and step == self._first:
            synchronize(self.device)
            self._torch.start()
        if trainer.current_epoch == 1 and step == self._end:
            synchronize(self.device)
            self._torch.stop()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._python.disable()

    def host(self) -> str:
        """Return what the host's time in an epoch went to."""
        out = io.StringIO()
        statistics_of = pstats.Stats(self._python, stream=out)
        statistics_of.sort_stats("tottime").print_stats(LINES)
        statistics_of.sort_stats("cumtime").print_stats(LINES)
        return out.getvalue()

    def device_table(self) -> str:
        """Return what the device's time in the profiled steps went to, as torch has it."""
        by = "self_device_time_total" if self.device == "cuda" else "self_cpu_time_total"
        table: str = self._torch.key_averages().table(
            sort_by=by, row_limit=LINES, max_name_column_width=70
        )
        return table

    def summary(self) -> str:
        """Say how long the device computes in a step, and how many kernels that are."""
        steps = self._end - self._first
        events = [each for each in self._torch.events() if each.device_type.name == "CUDA"]
        busy = sum(each.device_time for each in events) / 1000 / steps
        return (
            f"{busy:.1f} ms of the device's in a step, {len(events) / steps:.0f} kernels and copies"
            if events
            else "no device; the host's tables are in the log"
        )
