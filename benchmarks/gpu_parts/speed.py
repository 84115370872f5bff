"""Parts of the GPU campaign that measure speed: waits in steps, rates, a run with a preset."""

from __future__ import annotations

import functools
import gc
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import images as measured
from benchmarks.gpu_parts.here import BATCH, Here, started, succeeded
from benchmarks.gpu_parts.machine import matrix_peak, synchronize
from benchmarks.side_by_side import cell

TURNS = {"cuda": 3, "cpu": 1}
"""How often two things that are compared run, in turn."""
RATE_EPOCHS = {"cuda": 4, "cpu": 2}
"""Of each of these runs; the first does not count."""
PRESET_EPOCHS = {"cuda": 15, "cpu": 1}


def waits(here: Here) -> None:
    """List the places in training steps that wait for the device; then have none raise."""
    from benchmarks.waits import WaitsInSteps, callback_added

    def switch(mode: str) -> None:
        if here.device == "cuda":
            torch.cuda.set_sync_debug_mode(mode)

    size = BATCH[here.device]
    subjects: dict[str, dict[str, Any]] = {
        "defaults": {"batch_size": size},
        "preset cifar": {"preset": "cifar", "batch_size": size},
    }
    for subject, settings in subjects.items():
        for mode in ("warn", "error"):
            watch = WaitsInSteps(mode, switch)
            with callback_added(watch):
                try:
                    here.fitted(f"{subject.replace(' ', '-')}-{mode}", "few",
                                {**settings, "max_epochs": 1})  # fmt: skip
                except RuntimeError as error:
                    if mode == "warn" or "synchronizing" not in str(error):
                        raise
                    said = " ".join(str(error).split())[:200]
                    here.found.claim(f"{subject}: in mode error no step raises", False, said)
                    continue
            if here.device == "cpu":
                here.found.say(
                    f"{subject}: mode {mode}", f"{watch.steps} steps gone through, none watched"
                )
                continue
            if mode == "error":
                here.found.claim(
                    f"{subject}: in mode error no step raises", True, f"{watch.steps} steps"
                )
                continue
            here.found.claim(
                f"{subject}: no step waits",
                not watch.places,
                f"{watch.places.total()} waits in {watch.steps} steps",
            )
            for place, count in watch.places.most_common():
                here.found.say(f"{subject}: {place}", f"{count} times")
            here.found.figures[subject] = dict(watch.places)


def rates(here: Here) -> None:
    """Measure the project beside a bare loop, and with determinism, in turn."""
    on_gpu = here.device == "cuda"
    _compare(here, TURNS[here.device], 512 if on_gpu else 32, compiled=False, deterministic=True)
    _compare(here, TURNS[here.device], 128 if on_gpu else 16, compiled=False, deterministic=False)


def compiled(here: Here) -> None:
    """Measure the project beside a bare loop, both compiled."""
    size = 512 if here.device == "cuda" else 16
    if here.device == "cpu":
        # Kernels for a CPU take a C++ compiler minutes, and are not those of a GPU: a rehearsal
        # traces the network and its gradients, and runs what it has traced as it is.
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
        here.found.say("backend", "aot_eager: traced, no kernels generated")
    _compare(here, min(2, TURNS[here.device]), size, compiled=True, deterministic=False)


def _compare(
    here: Here, turns: int, batch_size: int, *, compiled: bool, deterministic: bool
) -> None:
    settings = {
        "batch_size": batch_size, "precision": "bf16-mixed", "channels_last": True,
        "compile": compiled, "stem": "cifar" if here.device == "cuda" else "imagenet",
    }  # fmt: skip
    subjects: dict[str, Callable[[int], list[float]]] = {
        "bare loop": lambda turn: _bare_rates(here, settings),
        "cifar_dist": lambda turn: _project_rates(here, turn, settings, False),
    }
    if deterministic:
        subjects["cifar_dist, deterministic"] = lambda turn: _project_rates(
            here, turn, settings, True
        )
    title = f"batch {batch_size}, bf16, channels-last" + (", compiled" if compiled else "")
    peak, operations = matrix_peak(here.device), operations_per_image()
    # By turn: a ratio is of two medians of one turn, since clocks and temperatures drift.
    by_turn: dict[str, list[list[float]]] = {name: [] for name in subjects}
    for turn in range(turns):
        for name, measure in subjects.items():
            by_turn[name].append(measure(turn))
            gc.collect()
            every = [rate for epochs in by_turn[name] for rate in epochs]
            share = statistics.median(every) * operations / peak
            said = f"{cell(every)} images/s of {len(every)} epochs"
            if here.device == "cuda":
                said += f", {share:.3f} of the matrix peak"
            key = f"{title}: {name}"
            here.found.say(key, said, **{key: {"by_turn": by_turn[name], "share_of_peak": share}})
        for name, over in (
            ("cifar_dist", "bare loop"),
            ("cifar_dist, deterministic", "cifar_dist"),
        ):
            if name in subjects:
                mine, its = (map(statistics.median, by_turn[each]) for each in (name, over))
                ratios = [a / b for a, b in zip(mine, its, strict=True)]
                key = f"{title}: {name} over {over}"
                here.found.say(
                    key, f"{cell(ratios, '.3f')} of {len(ratios)} turns", **{key: ratios}
                )


def operations_per_image() -> float:
    """Return the operations of a training step for an image, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    from cifar_dist.model.resnet import resnet18

    network, count = resnet18(10, "cifar"), 2
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(count, 3, 32, 32)).sum().backward()
    return counter.get_total_flops() / count


def _bare_rates(here: Here, settings: Mapping[str, Any]) -> list[float]:
    from benchmarks.bare import Settings, loop

    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = True
    chosen = Settings(**settings, device=here.device, fused=True)
    return loop(here.folder("rates"), RATE_EPOCHS[here.device], chosen)[1:]


def _project_rates(
    here: Here, turn: int, settings: Mapping[str, Any], deterministic: bool
) -> list[float]:
    from benchmarks.waits import callback_added

    clock = _epoch_clock(here.device)
    epochs = RATE_EPOCHS[here.device]
    name = "-".join(map(str, [*settings.values(), deterministic, turn]))
    shared = {"max_epochs": epochs, "checkpoint_every": epochs, "deterministic": deterministic}
    with callback_added(clock):
        outcome = here.fitted(name, "rates", {**settings, **shared}, test=False)
    shutil.rmtree(here.runs / name)  # several GB over all turns
    images: int = outcome.history[0]["samples"]
    return [images / seconds for seconds in clock.seconds[1:]]


def _epoch_clock(device: str) -> Any:
    """Return a callback that times an epoch's training, to the end of what was queued.

    The project's own column reads its clock without asking what the device has still to do.
    """
    import lightning.pytorch as pl

    class EpochClock(pl.Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._began = 0.0

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            synchronize(device)
            self._began = time.perf_counter()

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            synchronize(device)
            self.seconds.append(time.perf_counter() - self._began)

    return EpochClock()


def preset(here: Here) -> None:
    """Train with the preset ``cifar`` as a user does."""
    epochs = PRESET_EPOCHS[here.device]
    small = ["--batch-size", "32"] if here.device == "cpu" else []
    words = ["--preset", "cifar", "--max-epochs", str(epochs), "--num-workers", "0", *small]
    began = time.perf_counter()
    succeeded(started(here.train("preset", "full", *words)))
    took = time.perf_counter() - began
    found = here.read_summary("preset")
    rows = (here.runs / "preset" / "metrics.csv").read_text().splitlines()
    here.found.say(
        f"{epochs} epochs of {measured.source()}",
        f"test accuracy {found['test_accuracy']:.4f}, validation {found['val_accuracy']:.4f}; "
        f"{found['seconds']:.1f} s, {took:.1f} s with the command's start",
        summary=found, command_seconds=took, metrics=rows,
    )  # fmt: skip
    column = rows[0].split(",").index("seconds")
    seconds = [float(row.split(",")[column]) for row in rows[1:]]
    here.found.say("seconds an epoch, validation and checkpoint too", cell(seconds, ".2f"))
