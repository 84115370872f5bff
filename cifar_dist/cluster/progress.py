"""Workers that hang: how far each rank is, and which one the others wait for.

A rank that has stopped, e.g. reads from a folder that is gone, raises nothing, and the others wait
for it in a collective until that times out, after half an hour; then they are the ones that raise.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from cifar_dist.events import Listener, Warned

if TYPE_CHECKING:
    from cifar_dist.training.callbacks import CountProgress

REPORT_S = 10
"""How often a rank reports how far it is."""
UNHEARD_S = 30
"""How long a rank may report nothing before its process counts as stopped."""
WARN_S = 60
FIRST_STEP_WARN_S = 180
"""The same before the first step, with which e.g. the network is compiled."""
USUAL_STEPS = 10
"""So many times the usual step's time must pass as well."""


def name_workers(ranks: Iterable[int]) -> str:
    """Return workers' ranks, formatted for display."""
    return f"worker {', '.join(map(str, sorted(ranks)))}"


@dataclass(frozen=True)
class Stall:
    """Ranks that the others wait for."""

    seconds: float
    """Since one of them last got any farther."""
    usual_s: float | None
    """A step's time so far; None before the first one is done."""
    ranks: tuple[int, ...]
    """Those whose process reports nothing, else those that are the least far."""
    unheard: bool
    """Whether their processes report nothing."""

    def over(self, seconds: float) -> bool:
        """Return whether it has lasted so long, and long for this run's steps."""
        return self.seconds >= max(seconds, USUAL_STEPS * (self.usual_s or 0))

    def __str__(self) -> str:
        does = "is stopped or cut off" if self.unheard else "is in the same step"
        return f"no step has come for {self.seconds:.0f} s: {name_workers(self.ranks)} {does}"


@dataclass
class _Rank:
    farther_at: float
    heard_at: float
    marks: int = -1
    usual_s: float | None = None


class RankProgress:
    """How far the ranks of one start are, in the coordinator.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._starts: list[str] = []
        self._ranks: dict[int, _Rank] = {}

    def report(
        self, start: str, world_size: int, rank: int, marks: int, usual_s: float | None
    ) -> None:
        """Take a rank's report; those of workers that were replaced are ignored."""
        now = self._clock()
        if start not in self._starts:
            self._starts.append(start)
            # All of them: one may stop before it has reported anything.
            self._ranks = {each: _Rank(now, now) for each in range(world_size)}
        if start != self._starts[-1] or rank not in self._ranks:
            return
        known = self._ranks[rank]
        farther_at = now if marks != known.marks else known.farther_at
        self._ranks[rank] = _Rank(farther_at, now, marks, usual_s)

    def leave(self, start: str, rank: int) -> None:
        """Take note that a rank has ended its training."""
        if self._starts[-1:] == [start]:
            self._ranks.pop(rank, None)

    def forget(self) -> None:
        """Forget the ranks, until others start."""
        self._ranks = {}

    def stall(self) -> Stall | None:
        """Return what the ranks wait for at the moment, however short; None without any."""
        if not self._ranks:
            return None
        now = self._clock()
        unheard = [n for n, rank in self._ranks.items() if now - rank.heard_at > UNHEARD_S]
        least = min(rank.marks for rank in self._ranks.values())
        behind = unheard or [n for n, rank in self._ranks.items() if rank.marks == least]
        return Stall(
            now - min(rank.farther_at for rank in self._ranks.values()),
            max((r.usual_s for r in self._ranks.values() if r.usual_s is not None), default=None),
            tuple(behind),
            bool(unheard),
        )


class ProgressReporter:
    """A rank's end: a thread that reports how far the training thread is.

    Args:
        progress: what the training thread counts.
        timeout_s: after which workers count as failed; 0 for never.
        report: called every few seconds with the marks and the usual time of a step.
    """

    def __init__(
        self,
        progress: CountProgress,
        timeout_s: float,
        report: Callable[[int, float | None], object],
    ) -> None:
        self._progress = progress
        self._report = report
        self._every_s = interval(REPORT_S, timeout_s)
        self._closed = threading.Event()
        self._excused = False
        threading.Thread(target=self._run, daemon=True).start()

    @contextmanager
    def excused(self) -> Iterator[None]:
        """Count the time while this lasts as progress: the rank waits for somebody else."""
        self._excused = True
        try:
            yield
        finally:
            self._excused = False

    def close(self) -> None:
        """Report nothing more: training has ended here."""
        self._closed.set()

    def _run(self) -> None:
        while True:
            if self._excused:
                self._progress.marks += 1
            self._report(self._progress.marks, self._progress.usual_s)
            if self._closed.wait(self._every_s):
                return


@contextmanager
def killed_if_hung(progress: CountProgress, timeout_s: float) -> Iterator[ProgressReporter]:
    """Kill this process, while this lasts, where it trains alone and hangs.

    Args:
        progress: what the training thread counts.
        timeout_s: as of `ProgressReporter`.
    """
    known = RankProgress()

    def report(marks: int, usual_s: float | None) -> None:
        known.report("", 1, 0, marks, usual_s)
        stall = known.stall()
        if timeout_s and stall is not None and stall.over(timeout_s):
            # By a signal that no thread can hold up; whoever started this process restarts it.
            os.kill(os.getpid(), signal.SIGKILL)

    reporter = ProgressReporter(progress, timeout_s, report)
    try:
        yield reporter
    finally:
        reporter.close()


class HangWatch:
    """The driver's end: warns of workers that hang.

    Args:
        coordinator: the run's.
        listener: notified once a stall.
        timeout_s: after which workers count as failed; 0 for never.
    """

    def __init__(self, coordinator: Any, listener: Listener, timeout_s: float) -> None:
        self._coordinator = coordinator
        self._listener = listener
        self._timeout_s = timeout_s
        self._every_s = interval(REPORT_S, timeout_s)
        self._asked: Any = None
        self._asked_at = 0.0
        self.stall: Stall | None = None
        """That which lasts, once it was warned of."""

    def look(self) -> Stall | None:
        """Look, unless that was a moment ago; return a stall of workers that count as failed."""
        if self._asked is None:
            if time.monotonic() - self._asked_at >= self._every_s:
                self._asked, self._asked_at = self._coordinator.stall.remote(), time.monotonic()
            return None
        if not ray.wait([self._asked], timeout=0)[0]:
            return None
        stall: Stall | None = ray.get(self._asked)
        self._asked = None
        if stall is None or not stall.over(FIRST_STEP_WARN_S if stall.usual_s is None else WARN_S):
            self.stall = None
        else:
            known, self.stall = self.stall, stall  # first: the listener may raise
            if known is None:
                self._listener(Warned(f"{stall}{self._consequence}"))
        if stall is not None and self._timeout_s and stall.over(self._timeout_s):
            self.stall = stall
            return stall
        return None

    @property
    def _consequence(self) -> str:
        if not self._timeout_s:
            return "; it is waited for without end (--step-timeout 0)"
        return f"; after {self._timeout_s:.0f} s (--step-timeout) it counts as failed"


def interval(usual_s: float, timeout_s: float) -> float:
    """Return how often to look, so that a short timeout is not missed by a look."""
    return min(usual_s, timeout_s / 5) if timeout_s else usual_s
