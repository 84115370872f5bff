"""Parts of the GPU campaign that measure speed: waits in steps, rates, a run with a preset."""

from __future__ import annotations

import functools
import gc
import itertools
import shutil
import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from benchmarks import images as measured
from benchmarks.gpu_parts.here import BATCH, Here, started, succeeded
from benchmarks.gpu_parts.machine import matrix_peak, synchronize
from benchmarks.side_by_side import cell

TURNS = {"cuda": 2, "cpu": 1}
"""How often what is compared runs, in turn."""
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
                                {**settings, "max_epochs": 2})  # fmt: skip
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
    """Measure the project beside a bare loop, with CUDA graphs, and with determinism, in turn."""
    large, small = (512, 128) if here.device == "cuda" else (32, 16)
    graphs = {"cifar_dist, CUDA graphs": {"cuda_graphs": "on"}} if here.device == "cuda" else {}
    ways = {"cifar_dist": {}, **graphs}
    determined = {"cifar_dist, deterministic": {"deterministic": True}}
    comparisons = [
        Comparison(here, large, {**ways, **determined}),
        Comparison(here, small, ways),
    ]
    for turn in range(TURNS[here.device]):
        for comparison in comparisons:
            comparison.run(turn)


def compiled(here: Here) -> None:
    """Measure the project beside a bare loop, both compiled."""
    size = 512 if here.device == "cuda" else 16
    if here.device == "cpu":
        # Kernels for a CPU take a C++ compiler minutes, and are not those of a GPU: a rehearsal
        # traces the network and its gradients, and runs what it has traced as it is.
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
        here.found.say("backend", "aot_eager: traced, no kernels generated")
    comparison = Comparison(here, size, {"cifar_dist": {}}, compiled=True)
    for turn in range(TURNS[here.device]):
        comparison.run(turn)


def settings_of(here: Here, batch_size: int) -> dict[str, Any]:
    """Return the settings of what is measured: bf16, channels-last, the stem for small images."""
    stem = "cifar" if here.device == "cuda" else "imagenet"
    return {
        "batch_size": batch_size, "precision": "bf16-mixed", "channels_last": True, "stem": stem,
    }  # fmt: skip


class Comparison:
    """A bare loop and the project in some ways, at one batch size, in turn.

    Args:
        here: what to work with.
        batch_size: of all of them.
        ways: the project's further settings, by the name of each way.
        compiled: whether all are.
    """

    def __init__(
        self,
        here: Here,
        batch_size: int,
        ways: Mapping[str, Mapping[str, Any]],
        compiled: bool = False,
    ) -> None:
        self.here = here
        self.settings = {**settings_of(here, batch_size), "compile": compiled}
        self.ways = ways
        self.title = f"batch {batch_size}, bf16, channels-last" + (", compiled" if compiled else "")
        self.peak, self.operations = matrix_peak(here.device), operations_per_image()
        # By turn: a ratio is of two medians of one turn, since clocks and temperatures drift.
        self.by_turn: dict[str, list[list[float]]] = {}

    def run(self, turn: int) -> None:
        """Measure all once more, and say what has come out so far."""
        self._found("bare loop", _bare_rates(self.here, self.settings))
        for name, more in self.ways.items():
            measured = _project_rates(self.here, turn, {**self.settings, **more})
            self._found(name, measured.rates)
            self.here.found.say(f"{self.title}: {name}, an epoch", measured.parts)
            over = "bare loop" if "deterministic" not in more else "cifar_dist"
            mine, its = (map(statistics.median, self.by_turn[each]) for each in (name, over))
            ratios = [a / b for a, b in zip(mine, its, strict=True)]
            key = f"{self.title}: {name} over {over}"
            said = f"{cell(ratios, '.3f')} of {len(ratios)} turns"
            self.here.found.say(key, said, **{key: ratios})

    def _found(self, name: str, rates: list[float]) -> None:
        self.by_turn.setdefault(name, []).append(rates)
        gc.collect()
        every = [rate for epochs in self.by_turn[name] for rate in epochs]
        share = statistics.median(every) * self.operations / self.peak
        said = f"{cell(every)} images/s of {len(every)} epochs"
        if self.here.device == "cuda":
            said += f", {share:.3f} of the matrix peak"
        key = f"{self.title}: {name}"
        figures = {"by_turn": self.by_turn[name], "share_of_peak": share}
        self.here.found.say(key, said, **{key: figures})


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


class Measured(NamedTuple):
    """What a run of the project gave."""

    rates: list[float]
    """Images a second by epoch, without the first."""
    parts: str
    """What an epoch's seconds went to."""


def _project_rates(here: Here, turn: int, settings: Mapping[str, Any]) -> Measured:
    from benchmarks.waits import callback_added

    clock = epoch_clock(here.device)
    epochs = RATE_EPOCHS[here.device]
    name = "-".join(map(str, [*settings.values(), turn]))
    shared = {"max_epochs": epochs, "checkpoint_every": epochs, "deterministic": False}
    with callback_added(clock):
        outcome = here.fitted(name, "rates", {**shared, **settings}, test=False)
    shutil.rmtree(here.runs / name)  # several GB over all turns
    images: int = outcome.history[0]["samples"]
    return Measured([images / seconds for seconds in clock.seconds[1:]], clock.parts())


def epoch_clock(device: str) -> Any:
    """Return a callback that times an epoch's training, to the end of what was queued.

    The project's own column reads its clock without asking what the device has still to do.
    """
    import lightning.pytorch as pl

    class EpochClock(pl.Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._began = 0.0
            self._steps: list[float] = []

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            synchronize(device)
            self._began = time.perf_counter()
            self._steps = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
            self._steps.append(time.perf_counter())

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            self._queued = time.perf_counter()
            synchronize(device)
            self._ended = time.perf_counter()
            self.seconds.append(self._ended - self._began)

        def parts(self) -> str:
            """Say what the last epoch's seconds went to."""
            steps = [1000 * (b - a) for a, b in itertools.pairwise(self._steps)]
            first = 1000 * (self._steps[0] - self._began)
            waited = 1000 * (self._ended - self._queued)
            return (
                f"{first:.0f} ms to the first step; {cell(steps, '.1f')} ms for the host to queue "
                f"a step; {waited:.0f} ms for the device after the last"
            )

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
