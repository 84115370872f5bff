"""Kills parts of real runs at moments drawn from a seed, and sees what becomes of the runs."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar_dist.runs import TIMING_METRICS, RunDirectory
from tests.faults.hosts import Hosts, _environment
from tests.processes import descendants

KINDS = ("worker", "all workers", "controller", "driver", "node", "interrupt", "preemption")
WORKERS = 2
SETTINGS = {"dataset": "digits", "num_workers": WORKERS, "batch_size": 150,
            "checkpoint_every": "4s", "max_failures": 10}  # fmt: skip
STEPS = 9
"""Of an epoch: 1,350 images."""
RUN_TIMEOUT_S = 900
NOTICE_S = 15
"""Between the notice that a node is about to go, and its end."""


@dataclass
class Fault:
    """What is killed, and when."""

    kind: str
    step: int
    """Of the run, 0-based: it happens after this step has been told..."""
    delay: float
    """...and so many seconds."""
    which: int
    """Of several that could be killed."""
    was_at: int = -1
    """The step that was last told of before it."""
    restarts: int = 0
    detected: float | None = None
    """Seconds from the kill until the driver says that workers were lost."""
    restarted: float | None = None
    """Until new workers begin to train."""
    caught_up: float | None = None
    """Until they are where the killed ones were."""


def draw(seed: int, kinds: Sequence[str], steps: int) -> list[Fault]:
    """Faults of these kinds, in this order, at moments spread over a run by a seed."""
    moments = random.Random(seed)
    at = sorted(moments.sample(range(1, steps - 1), len(kinds)))
    return [
        Fault(kind, step, moments.uniform(0, 1.5), moments.randrange(1000))
        for kind, step in zip(kinds, at, strict=True)
    ]


def draw_kinds(seed: int, kills: int) -> list[str]:
    """Kinds of faults: each equally often, in an order drawn from a seed."""
    kinds = [KINDS[number % len(KINDS)] for number in range(kills)]
    random.Random(f"kinds {seed}").shuffle(kinds)
    return kinds


@dataclass
class Run:
    """A run of the faults suite, as its end and its driver's events tell it."""

    directory: RunDirectory
    faults: list[Fault] = field(default_factory=list)

    @property
    def weights_sha256(self) -> str:
        return str(self.directory.read_summary()["weights_sha256"])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """``metrics.csv`` without its timing columns."""
        return [
            {name: value for name, value in row.items() if name not in TIMING_METRICS}
            for row in self.directory.read_metrics()
        ]

    @property
    def every_image_once(self) -> bool:
        """Whether all 1,350 training images went into each epoch exactly once."""
        epochs = json.loads((self.directory.path / "images.json").read_text())
        return all(epoch == {"0": 650, "1": 1350} for epoch in epochs)

    def same_bits(self, other: Run) -> bool:
        """Whether it ended with the weights and the history of another one."""
        return (self.weights_sha256, self.rows) == (other.weights_sha256, other.rows)


class _Driver:
    """The driver's process, and the events that it tells."""

    def __init__(self, cluster: Hosts, config: dict[str, Any]) -> None:
        words = [sys.executable, "-m", "tests.faults.driver", json.dumps(config)]
        self.process = subprocess.Popen(
            cluster.command(words),
            env=_environment(RAY_ADDRESS=cluster.address, GLOO_SOCKET_IFNAME="eth0"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def events(self, until: float) -> Iterator[dict[str, Any] | None]:
        """Events as they come, and None now and then; ends with the process."""
        while True:
            try:
                line = self._lines.get(timeout=0.05)
            except queue.Empty:
                assert time.monotonic() < until, "the run does not end"
                yield None
                continue
            if line is None:
                return
            if line.startswith("{"):
                yield json.loads(line)


def run(
    cluster: Hosts,
    folder: Path,
    name: str,
    epochs: int,
    faults: Sequence[Fault] = (),
    **settings: Any,
) -> Run:
    """Train, with faults on the way; a driver that was killed is started again with ``--resume``.

    Raises:
        AssertionError: the run failed, or does not end.
    """
    config = {**SETTINGS, **settings, "max_epochs": epochs, "storage_path": str(folder),
              "name": name}  # fmt: skip
    result = Run(RunDirectory.at(str(folder), name), list(faults))
    waiting = list(faults)
    open_faults: list[tuple[Fault, float, int]] = []
    until = time.monotonic() + RUN_TIMEOUT_S
    driver = _Driver(cluster, config)
    position, due = -1, None
    missing_hosts, leaving, leaves_at = 0, None, 0.0
    try:
        while True:
            for event in driver.events(until):
                now = time.monotonic()
                if event is not None:
                    position = _position(event, position)
                    _account(event, position, now, open_faults)
                    if event["kind"] == "start":
                        for _ in range(missing_hosts):
                            cluster.add()
                        missing_hosts = 0
                if leaving is not None and now >= leaves_at:
                    cluster.lose(leaving)
                    cluster.add()
                    leaving = None
                training = event is not None and event["kind"] == "step"
                if waiting and due is None and training and position >= waiting[0].step:
                    due = now + waiting[0].delay
                if due is not None and now >= due:
                    fault, due = waiting.pop(0), None
                    fault.was_at = position
                    open_faults.append((fault, time.monotonic(), position))
                    if fault.kind == "driver":
                        _signal(driver.process.pid, signal.SIGKILL)
                    elif fault.kind == "interrupt":
                        _signal(driver.process.pid, signal.SIGINT)
                    elif fault.kind == "preemption":
                        leaving = cluster.names()[fault.which % len(cluster.names())]
                        leaves_at = time.monotonic() + NOTICE_S
                        cluster.notice(leaving, NOTICE_S)
                    elif fault.kind == "node":
                        cluster.lose(cluster.names()[fault.which % len(cluster.names())])
                        if ":" in str(config["num_workers"]):
                            missing_hosts += 1  # the run goes on without, and a new one joins it
                        else:
                            cluster.add()
                    else:
                        _kill_in_cluster(fault)
            code = driver.process.wait()
            if code == 0:
                break
            assert code in (-signal.SIGKILL, 130), (code, driver.process.stderr.read())
            driver = _Driver(cluster, {**config, "resume": True})
    finally:
        if driver.process.poll() is None:
            driver.process.kill()
    assert not waiting, f"the run was over before {waiting}"
    return result


def _position(event: dict[str, Any], before: int) -> int:
    """The step (of the run, 0-based) that an event tells of."""
    if event["kind"] == "step":
        return (event["epoch"] - 1) * STEPS + event["step"] - 1
    if event["kind"] == "epoch":
        return event["epoch"] * STEPS - 1
    return -1 if event["kind"] == "start" else before


def _account(
    event: dict[str, Any], position: int, now: float, open_faults: list[tuple[Fault, float, int]]
) -> None:
    for fault, killed, was_at in list(open_faults):
        if event["kind"] in ("lost", "plan"):  # a killed driver's successor begins with its plan
            fault.detected = fault.detected or now - killed
        elif event["kind"] == "start":
            fault.detected = fault.detected or now - killed
            fault.restarts += 1
            fault.restarted = now - killed
        elif fault.restarts and position >= was_at:
            fault.caught_up = now - killed
            open_faults.remove((fault, killed, was_at))


def _kill_in_cluster(fault: Fault) -> None:
    title = "TrainController" if fault.kind == "controller" else "RayTrainWorker"
    pids = sorted(pid for pid, name in descendants().items() if f"ray::{title}" in name)
    assert pids, f"no {title} among {list(descendants().values())}"
    for pid in pids if fault.kind == "all workers" else [pids[fault.which % len(pids)]]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _signal(pid: int, signum: int) -> None:
    """Send a signal to the driver, which may be a process or its child."""
    for each, name in descendants(pid).items():
        if "tests.faults.driver" in name:
            os.kill(each, signum)
