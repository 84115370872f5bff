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

from cifar_dist.runs.directory import RunDirectory
from cifar_dist.runs.metrics import TIMING_METRICS
from tests.faults.hosts import Hosts, environment
from tests.processes import descendants

KILLS = ("worker", "all workers", "controller", "driver", "node")
ASKS = ("interrupt", "preemption")
KINDS = (*KILLS, *ASKS)
WORKERS = 2
SETTINGS = {"dataset": "digits", "num_workers": WORKERS, "batch_size": 150,
            "checkpoint_every": "4s", "max_failures": 10, "report": False}  # fmt: skip
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
    warned: bool = False
    """Whether the driver said before the end of a host that it would go."""


def draw(seed: int, kinds: Sequence[str], steps: int) -> list[Fault]:
    """Faults of these kinds, in this order, at moments spread over a run by a seed."""
    moments = random.Random(seed)
    at = sorted(moments.sample(range(1, steps - 1), len(kinds)))
    return [
        Fault(kind, step, moments.uniform(0, 1.5), moments.randrange(1000))
        for kind, step in zip(kinds, at, strict=True)
    ]


def draw_kinds(seed: int, kills: int, asks: int) -> list[str]:
    """Kinds of faults: kills, and runs that are asked to stop or nodes that are about to go; each
    equally often, in an order drawn from a seed."""
    kinds = [KILLS[number % len(KILLS)] for number in range(kills)]
    kinds += [ASKS[number % len(ASKS)] for number in range(asks)]
    random.Random(f"kinds {seed}").shuffle(kinds)
    return kinds


@dataclass
class Run:
    """A run of the faults suite, as its end and its driver's events tell it."""

    directory: RunDirectory
    faults: list[Fault] = field(default_factory=list)
    first_start: float = 0.0
    """Seconds from the driver's plan to the workers' first start."""

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

    @property
    def workers(self) -> list[int]:
        """How many workers each epoch had."""
        return [row["world_size"] for row in self.rows]

    def same_weights(self, other: Run) -> bool:
        """Whether it ended with the weights of another one, to the bit."""
        return self.weights_sha256 == other.weights_sha256

    def same_history(self, other: Run) -> bool:
        """Whether its ``metrics.csv`` is another's, timing aside, to the last digit."""
        return self.rows == other.rows


class _Driver:
    """The driver's process, and the events that it tells."""

    def __init__(self, cluster: Hosts, config: dict[str, Any]) -> None:
        words = [sys.executable, "-m", "tests.faults.driver", json.dumps(config)]
        self.process = subprocess.Popen(
            cluster.command(words),
            env=environment(RAY_ADDRESS=cluster.address, GLOO_SOCKET_IFNAME="eth0"),
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
    until = time.monotonic() + RUN_TIMEOUT_S
    driver = _Driver(cluster, config)
    happens = _Happening(cluster, list(faults), elastic=":" in str(config["num_workers"]))
    planned = None
    try:
        while True:
            for event in driver.events(until):
                happens.next(event, driver.process.pid)
                if event is not None and event["kind"] == "Plan":
                    planned = planned or time.monotonic()
                if event is not None and event["kind"] == "Started" and not result.first_start:
                    result.first_start = time.monotonic() - planned
            code = driver.process.wait()
            if code == 0:
                break
            said = driver.process.stderr.read()
            assert code in (-signal.SIGKILL, 130), (code, said)
            assert code != 130 or "to resume: python -m cifar_dist.train" in said, said
            driver = _Driver(cluster, {**config, "resume": True})
    finally:
        if driver.process.poll() is None:
            driver.process.kill()
    assert not happens.waiting, f"the run was over before {happens.waiting}"
    for fault in faults:
        assert fault.kind != "preemption" or fault.warned, "nothing was said of the notice"
    return result


class _Happening:
    """Makes faults happen when a run's events say that it is time, and notes what follows."""

    def __init__(self, cluster: Hosts, faults: list[Fault], elastic: bool) -> None:
        self.cluster, self.waiting, self.elastic = cluster, faults, elastic
        self._position = -1
        self._due: float | None = None
        self._open: list[tuple[Fault, float]] = []
        self._leaving: tuple[str, float] | None = None
        self._missing_hosts = 0

    def next(self, event: dict[str, Any] | None, driver: int) -> None:
        """Take an event, or None where some time has passed."""
        now = time.monotonic()
        if event is not None:
            self._position = _position(event, self._position)
            self._account(event, now)
            if event["kind"] == "Started":
                for _ in range(self._missing_hosts):
                    self.cluster.add()
                self._missing_hosts = 0
            training = event["kind"] == "StepDone" and self._due is None
            if training and self.waiting and self._position >= self.waiting[0].step:
                self._due = now + self.waiting[0].delay
        if self._leaving is not None and now >= self._leaving[1]:
            self.cluster.lose(self._leaving[0])
            self.cluster.add()
            self._leaving = None
        if self._due is not None and now >= self._due:
            fault, self._due = self.waiting.pop(0), None
            fault.was_at = self._position
            self._open.append((fault, time.monotonic()))
            self._do(fault, driver)

    def _do(self, fault: Fault, driver: int) -> None:
        hosts = self.cluster.names()
        if fault.kind in ("driver", "interrupt"):
            _signal(driver, signal.SIGKILL if fault.kind == "driver" else signal.SIGINT)
        elif fault.kind == "preemption":
            self._leaving = hosts[fault.which % len(hosts)], time.monotonic() + NOTICE_S
            self.cluster.notice(self._leaving[0], NOTICE_S)
        elif fault.kind == "node":
            self.cluster.lose(hosts[fault.which % len(hosts)])
            if self.elastic:
                self._missing_hosts += 1  # the run goes on without it, and another joins later
            else:
                self.cluster.add()
        else:
            _kill_in_cluster(fault)

    def _account(self, event: dict[str, Any], now: float) -> None:
        for fault, killed in list(self._open):
            since = now - killed
            if event["kind"] == "Warned" and "is about to go" in event["message"]:
                fault.warned = fault.warned or self._leaving is not None
            # A driver's successor begins with its plan.
            if event["kind"] in ("WorkersLost", "Plan"):
                fault.detected = fault.detected or since
            elif event["kind"] == "Started":
                fault.detected = fault.detected or since
                fault.restarts += 1
                fault.restarted = since
            elif fault.restarts and self._position >= fault.was_at:
                fault.caught_up = since
                self._open.remove((fault, killed))


def _position(event: dict[str, Any], before: int) -> int:
    """Return the step (of the run, 0-based) that an event is about."""
    if event["kind"] == "StepDone":
        return (event["epoch"] - 1) * STEPS + event["step"] - 1
    if event["kind"] == "EpochDone":
        return event["row"]["epoch"] * STEPS - 1
    return -1 if event["kind"] == "Started" else before


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
