"""A trial's process, which trains, or supervises a Ray Train run.

At import this loads neither torch nor Lightning: a trial does when it trains.
"""

from __future__ import annotations

import gc
import os
import queue
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from cifar_dist.cluster import ray_internals
from cifar_dist.cluster.progress import killed_if_hung
from cifar_dist.cluster.threads import InThread
from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import RunFailed, UserError
from cifar_dist.events import EpochDone, Event, RestartCounter
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.runs.metrics import Outcome
from cifar_dist.search.directory import SearchDirectory
from cifar_dist.storage import storage_failure

POLL_S = 0.1
STOP_TIMEOUT_S = 60
"""How long a trial that is stopped may take to end by itself."""

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrialWork:
    """All that a trial's training needs to know."""

    config: TrainConfig
    run: RunDirectory
    dataset_fingerprint: str
    launched: Mapping[str, Any]
    report: Report
    """Called with each epoch's row; returns when the trial may continue, and never where it is
    stopped."""


Training = Callable[[TrialWork], Outcome | None]


@dataclass(frozen=True)
class Plan:
    """The part of a trial's work that all trials of a search share."""

    directory: SearchDirectory
    base: TrainConfig
    configured: Callable[[TrainConfig, Mapping[str, Any]], TrainConfig]
    dataset_fingerprint: str
    launched: Mapping[str, Any]
    training: Training
    ray_internals: bool
    """Whether the driver uses `cifar_dist.cluster.ray_internals`; trials then do, too."""

    def work(self, suggested: Mapping[str, Any], report: Report) -> TrialWork:
        """Return a trial's work, from the configuration that Ray Tune hands to its process."""
        config = self.configured(self.base, suggested["drawn"])
        run = self.directory.trial(suggested["number"])
        return TrialWork(config, run, self.dataset_fingerprint, self.launched, report)


def train_here(work: TrialWork) -> Outcome:
    """Train in this process, as the only worker."""
    from cifar_dist.data.cache import prepare_same
    from cifar_dist.training.torchmetrics_alone import load_torchmetrics_alone

    load_torchmetrics_alone()
    from cifar_dist.training.callbacks import CountProgress
    from cifar_dist.training.fit import fit

    config, progress = work.config, CountProgress()
    assert config.data_dir is not None  # resolved when the config was made
    gc.collect()  # the network and optimizer of the trial before, which refer to each other
    dataset = prepare_same(config.dataset, config.data_dir, work.dataset_fingerprint)
    with killed_if_hung(progress, config.step_timeout_s) as reporter:

        def report(row: dict[str, Any]) -> None:
            with reporter.excused():
                work.report(row)

        return fit(
            config, work.run, dataset, launched=work.launched, report=report, progress=progress,
            test=False,
        )  # fmt: skip


def ended(work: TrialWork, training: Training) -> dict[str, Any]:
    """Train a trial to its end, and return how it ended: ``ended``, ``error`` of a failed one, and
    ``lost``, whether this process is of no more use.

    What a training raises ends the trial and is written to disk: the search continues, and a
    search that is resumed does not run the trial again. But where the machine's storage fails, all
    other trials would fail too: the trial has not ended then, and ``storage`` says what failed.
    """
    try:
        return _ended(work, training)
    except Exception as error:
        if (failure := storage_failure(error)) is None:
            raise
        return {"storage": str(failure), "lost": False, "error": None}


def _ended(work: TrialWork, training: Training) -> dict[str, Any]:
    run, dataset = work.run, work.config.dataset
    # Tune restarts a trial whose process died, also where it died after the trial's end: its
    # summary is then final, and training it again would only cost its time.
    before = run.read_summary()
    if before.get("status") in ("completed", "failed"):
        return {"ended": True, "error": before.get("error"), "lost": False}
    began = time.monotonic()
    run.begin(work.config)
    try:
        outcome = training(work)
    except Exception as error:
        if storage_failure(error) is not None:
            raise
        run.write_error(traceback.format_exc())
        text = in_one_line(error)
        seconds = time.monotonic() - began
        run.write_summary(dataset, "failed", seconds=seconds, error=text)
        return {"ended": True, "error": text, "lost": device_lost(error)}
    # Written before Tune learns of the end: a kill in between leaves a trial that a resumed search
    # counts as completed, not one to train again.
    run.write_summary(dataset, "completed", outcome, seconds=time.monotonic() - began)
    return {"ended": True, "error": None, "lost": False}


def device_lost(error: BaseException) -> bool:
    """Return whether an exception leaves this process without a usable device.

    After an error of the driver, e.g. an illegal memory access, every later call of CUDA in the
    process fails with the same error. Memory that has run out is none of these: it can be freed.
    """
    seen: BaseException | None = error
    while seen is not None:
        kinds = {kind.__name__ for kind in type(seen).__mro__}  # torch may not be loaded here
        if "OutOfMemoryError" not in kinds and (
            "AcceleratorError" in kinds or _OF_A_DEVICE.search(str(seen))
        ):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


_OF_A_DEVICE = re.compile(r"\b(CUDA|HIP|cuDNN|NCCL) error\b|\bTriton Error \[|CU(DNN|BLAS)_STATUS_")
"""In the messages of errors that torch, its libraries and Triton raise for a device."""


def free_memory() -> None:
    """Give back what a failed trial held, so that neither the next one nor a neighbour on the same
    GPU runs out of memory because of it."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def in_one_line(error: BaseException) -> str:
    """Return an exception's type and message, for a cell of the table."""
    name = "" if isinstance(error, UserError | RunFailed) else f"{type(error).__name__}: "
    # A worker's traceback: what it raised is its last line.
    message = (str(error).strip().splitlines() or [""])[-1 if isinstance(error, RunFailed) else 0]
    return f"{name}{message}".strip(": ")[:500]


def one_worker(suggested: dict[str, Any], plan: Plan) -> None:
    """Train a trial in its own process, as a function that Ray Tune calls.

    The process stays for the trials after it, with all that it has loaded.
    """
    # Ray gives up on a process whose last trial is not over so quickly, and on its next trial.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(STOP_TIMEOUT_S)
    work = plan.work(suggested, report=tune.report)
    end = ended(work, plan.training)
    tune.report(end)
    if end["lost"]:
        # Tune ends a process that raises, and does not call the trial again in another: the
        # scheduler has read that it is over. Trials that came after it here would all fail.
        raise RunFailed(end["error"])
    if end["error"] is not None:
        free_memory()


class SeveralWorkers(tune.Trainable):
    """Ray Tune's class for a trial whose workers are a Ray Train run of their own."""

    def setup(self, config: dict[str, Any], plan: Plan) -> None:
        from cifar_dist.cluster.coordinator import make_coordinator
        from cifar_dist.cluster.trainer import train_on_ray

        # On another node the environment may lack `CIFAR_DIST_PLAIN_RAY`.
        ray_internals.follow_driver(plan.ray_internals)
        self._rows: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reported = 0
        self._coordinator = make_coordinator(wait=True)

        def train(work: TrialWork) -> Outcome:
            def listen(event: Event) -> None:
                if isinstance(event, EpochDone):
                    work.report(dict(event.row))

            outcome = train_on_ray(
                work.config, work.run, work.dataset_fingerprint, work.launched,
                RestartCounter(listen), coordinator=self._coordinator,
            )  # fmt: skip
            if outcome is None:
                raise SystemExit("stopped by the scheduler")  # as Tune ends a function's thread
            return outcome

        work = plan.work(config, report=self._rows.put)
        self._running = InThread(lambda: ended(work, train))

    def step(self) -> dict[str, Any]:
        if self._reported:
            ray.get(self._coordinator.release.remote(self._reported))
        while True:
            alive = self._running.alive
            try:
                row = self._rows.get(timeout=POLL_S)
            except queue.Empty:
                if alive:
                    continue
                if self._running.error is not None:
                    raise self._running.error from None
                return {**self._running.result, "done": True}
            if row["epoch"] > self._reported:  # else reported before workers were restarted
                self._reported = row["epoch"]
                return row

    def cleanup(self) -> None:
        # By itself, and not by the death of this process: so the run gives its resources back.
        ray.get(self._coordinator.release.remote(0, stop=True))
        self._running.join(STOP_TIMEOUT_S)
