"""Where a training step's time goes, as its parts take it one after the other.

Used by `benchmarks.step`. The project is timed in its workers, by wrapping what it calls:

- data: taking the next batch, augmenting and normalising it
- forward: the network, the loss, and counting them
- backward: as it is where nothing is exchanged; every other step of several workers is such a one
- exchange: what a backward pass takes more where gradients are exchanged, behind what overlaps
- optimizer: the update
- Lightning and callbacks: all that is left of the time from one step to the next
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FILE = "CIFAR_DIST_BENCHMARK_SHARES"
"""Environment variable: where rank 0 writes its figures, as JSON."""
WARM_UP = 6
"""Steps that do not count."""


class Clock:
    """Seconds of each step's parts, on this rank."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.exchanges: list[bool] = []
        self.began = time.perf_counter()
        self.backward_over = 0.0

    def add(self, part: str, seconds: float) -> None:
        """Add to the step under way."""
        if self.steps:
            self.steps[-1][part] = self.steps[-1].get(part, 0.0) + seconds

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose time is counted."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.backward_over = time.perf_counter()
                self.add(part, self.backward_over - began)

        return wrapped

    def next_step(self, seconds: float, exchange: bool) -> None:
        """A step begins with its batch, which took so long to gather."""
        now = time.perf_counter() - seconds
        if self.steps:
            self.steps[-1]["all"] = now - self.began
        self.steps.append({"data": seconds})
        self.exchanges.append(exchange)
        self.began = now

    def figures(self) -> dict[str, float]:
        """The median step's parts in seconds."""
        counted = [
            (step, exchange)
            for step, exchange in zip(self.steps, self.exchanges, strict=True)
            if "all" in step and "optimizer" in step
        ][WARM_UP:]

        def median(part: str, exchange: bool | None = None) -> float:
            values = [s[part] for s, e in counted if exchange is None or e is exchange]
            return statistics.median(values)

        several = not all(exchange for _, exchange in counted)
        backward = median("backward", False if several else None)
        found = {
            "data": median("data"),
            "forward": median("forward"),
            "backward": backward,
            "exchange": median("backward", True) - backward if several else 0.0,
            "optimizer": median("optimizer"),
        }
        rest = [
            s["all"] - sum(s[part] for part in ("data", "forward", "backward", "optimizer"))
            for s, _ in counted
        ]
        return {**found, "Lightning and callbacks": statistics.median(rest)}


def install() -> Clock:
    """Have this process time its training steps."""
    import torch
    from lightning.pytorch.strategies import Strategy
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from cifar_dist.data.datamodule import ImageDataModule, TrainBatches
    from cifar_dist.model.classifier import Classifier

    clock = Clock()
    gathered: Any = TrainBatches.__iter__

    def batches(self: TrainBatches) -> Iterator[Any]:
        source = gathered(self)
        while True:
            began = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            took = time.perf_counter() - began
            several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
            clock.next_step(took, not several or len(clock.steps) % 2 == 0)
            yield batch

    forward = Classifier.training_step

    ready = ImageDataModule.ready

    def prepared(self: ImageDataModule, batch: Any) -> Any:
        model: Any = self.trainer.strategy.model if self.trainer else None
        if hasattr(model, "require_backward_grad_sync") and clock.exchanges:
            model.require_backward_grad_sync = clock.exchanges[-1]
        return ready(self, batch)

    patched: Any = ImageDataModule
    patched.ready = clock.timed("data", prepared)
    for owner, name, replacement in (
        (TrainBatches, "__iter__", batches),
        (Classifier, "training_step", clock.timed("forward", forward)),
        (Strategy, "backward", clock.timed("backward", Strategy.backward)),
    ):
        setattr(owner, name, replacement)
    register_optimizer_step_post_hook(
        lambda *_: clock.add("optimizer", time.perf_counter() - clock.backward_over)
    )
    return clock


def worker(work: Any) -> Any:
    """The project's worker, timed."""
    import ray.train

    from cifar_dist.cluster.trainer import train_worker

    clock = install()
    outcome = train_worker(work)
    if ray.train.get_context().get_world_rank() == 0:
        Path(os.environ[FILE]).write_text(json.dumps(clock.figures()))
    return outcome


def main() -> None:
    """Run ``cifar_dist.train`` with the arguments given, timed."""
    import sys

    from cifar_dist.train import main as train

    if "--num-workers=0" in sys.argv:
        clock = install()
        train(sys.argv[1:])
        Path(os.environ[FILE]).write_text(json.dumps(clock.figures()))
        return
    from benchmarks import shares
    from cifar_dist.cluster import trainer

    # By the module's name, under which workers find it.
    trainer.train_on_ray = functools.partial(trainer.train_on_ray, worker=shares.worker)
    train(sys.argv[1:])


if __name__ == "__main__":
    main()
